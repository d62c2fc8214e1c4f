"""Ends the server that the other end-to-end tests share, so it runs after them (conftest.py)."""

import os
import signal
import threading
import time

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

TOKENS = 400


def test_sigterm_lets_a_running_stream_finish_and_leaves_nothing_behind(server):
    texts: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            for chunk in client.completions.create(
                model="demo", prompt="import ", max_tokens=TOKENS, stream=True, extra_body={"ignore_eos": True}
            ):
                texts.append(chunk.choices[0].finish_reason or "")
                begun.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(30)
    server.process.send_signal(signal.SIGTERM)
    # Ctrl-C in a terminal reaches the engine's processes too; they must not end before the server tells them to.
    for pid in set(server.processes()) - {server.process.pid}:
        os.kill(pid, signal.SIGINT)
    while server.get("/readyz").status_code == 200:
        time.sleep(0.01)
    assert reader.is_alive(), "the stream ended before the drain could be seen"
    assert server.get("/livez").status_code == 200
    assert server.get("/readyz").json() == {"status": "not ready", "reason": "The server is shutting down."}
    refused = httpx.post(server.url + "/v1/completions", json={"model": "demo", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    reader.join(60)
    assert texts[-1] == "length"
    assert server.process.wait(60) == 0
    assert server.processes() == []
