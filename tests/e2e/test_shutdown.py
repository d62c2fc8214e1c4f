"""Ends the server that the other end-to-end tests share, so it runs after them (conftest.py)."""

import asyncio
import os
import signal
import time

import pytest

from tests.e2e.servers import Server
from tests.e2e.streams import Outcome, Request

pytestmark = pytest.mark.engine

TOKENS = 800
STREAMS = 12


def test_sigterm_lets_running_streams_finish_and_leaves_nothing_behind(server: Server) -> None:
    segments = server.shared_memory()
    outcomes = asyncio.run(drain(server))
    assert [(outcome.complete, outcome.done, outcome.error) for outcome in outcomes] == [(True, True, None)] * STREAMS
    assert server.process.wait(60) == 0
    # Python's resource tracker ends when it sees that its parent is gone: a moment later.
    deadline = time.monotonic() + 5
    while (left := server.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
    assert segments
    assert [path for path in segments if path.exists()] == []


async def drain(server: Server) -> list[Outcome]:
    """Signal the server while it streams; returns what became of the streams."""
    body = {"model": "demo", "prompt": "import ", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    streams = [Request(server.port, body, {}, "/v1/completions") for _ in range(STREAMS)]
    running = [asyncio.create_task(stream.run()) for stream in streams]
    await asyncio.wait_for(asyncio.gather(*(stream.first.wait() for stream in streams)), 30)
    server.process.send_signal(signal.SIGTERM)
    # Ctrl-C in a terminal reaches the engine's processes too; they must not end before the server tells them to.
    for pid in set(server.processes()) - {server.process.pid}:
        os.kill(pid, signal.SIGINT)
    await asyncio.to_thread(server.wait_until, lambda: server.get("/readyz").status_code == 503, 5, "draining")
    assert not any(task.done() for task in running), "a stream ended before the drain could be seen"
    assert server.get("/livez").status_code == 200
    assert server.get("/readyz").json() == {"status": "not ready", "reason": "The server is shutting down."}
    refused = server.post("/v1/completions", {"model": "demo", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    return await asyncio.wait_for(asyncio.gather(*running), 60)
