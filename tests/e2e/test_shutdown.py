"""Ends the server that the other end-to-end tests share, so it runs after them (conftest.py)."""

import concurrent.futures
import os
import signal
import threading
import time

import openai
import pytest

from tests.e2e.servers import Server

pytestmark = pytest.mark.engine

TOKENS = 2000


def test_sigterm_lets_a_running_stream_finish_and_leaves_nothing_behind(server):
    begun = threading.Event()

    def stream() -> list[str | None]:
        request = {"model": "demo", "prompt": "import ", "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
        reasons = []
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            for chunk in client.completions.create(**request, stream=True):
                reasons.append(chunk.choices[0].finish_reason)
                begun.set()
        return reasons

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream)
        assert begun.wait(30)
        _drain(server, running)
        assert running.result(60)[-1] == "length"
    assert server.process.wait(60) == 0
    # Python's resource tracker ends when it sees that its parent is gone: a moment later.
    deadline = time.monotonic() + 5
    while (left := server.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def _drain(server: Server, running: concurrent.futures.Future[list[str | None]]) -> None:
    server.process.send_signal(signal.SIGTERM)
    # Ctrl-C in a terminal reaches the engine's processes too; they must not end before the server tells them to.
    for pid in set(server.processes()) - {server.process.pid}:
        os.kill(pid, signal.SIGINT)
    while server.get("/readyz").status_code == 200:
        time.sleep(0.01)
    assert not running.done(), "the stream ended before the drain could be seen"
    assert server.get("/livez").status_code == 200
    assert server.get("/readyz").json() == {"status": "not ready", "reason": "The server is shutting down."}
    refused = server.post("/v1/completions", {"model": "demo", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
