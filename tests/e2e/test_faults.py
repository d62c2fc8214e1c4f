"""A real engine killed or stopped under load: the server comes back, and nobody hangs."""

import asyncio
import os
import signal
import time

import pytest

from tests.e2e.servers import Server
from tests.e2e.streams import Outcome, Request

pytestmark = pytest.mark.engine

LONG = {"model": "demo", "prompt": "import ", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}

# Seconds a client waits at most: detection, the kill, and the error's way to it.
PATIENCE = 45


def requests(server: Server, count: int, **fields: object) -> list[Request]:
    return [Request(server.port, LONG | fields, server.headers, "/v1/completions") for _ in range(count)]


async def hurt(server: Server, role: str, number: signal.Signals) -> tuple[list[Outcome], float]:
    """Signal an engine process while it works; returns what the clients saw, and seconds until /readyz said so."""
    streams, wholes = requests(server, 6, stream=True), requests(server, 3)
    running = [asyncio.create_task(request.run()) for request in (*streams, *wholes)]
    await asyncio.gather(*(request.first.wait() for request in streams))
    os.kill(server.engine_process(role), number)
    began = time.monotonic()
    while (await asyncio.to_thread(server.get, "/readyz")).status_code == 200:
        assert time.monotonic() - began < PATIENCE
        await asyncio.sleep(0.1)
    seconds = time.monotonic() - began
    return await asyncio.wait_for(asyncio.gather(*running), PATIENCE), seconds


@pytest.mark.parametrize(
    ("role", "number", "reason"),
    [
        ("EngineCore", signal.SIGKILL, "died"),
        ("Worker", signal.SIGKILL, "died"),
        ("EngineCore", signal.SIGSTOP, "hung"),
        ("Worker", signal.SIGSTOP, "hung"),
    ],
)
def test_an_engine_that_dies_or_hangs_is_replaced(guarded: Server, role, number, reason) -> None:
    guarded.wait_ready()
    segments, processes = guarded.shared_memory(), guarded.processes()
    assert segments
    restarts = guarded.total("sparse_engine_restarts_total", reason=reason)
    outcomes, seconds = asyncio.run(hurt(guarded, role, number))
    assert seconds <= 10
    assert guarded.get("/livez").status_code == 200
    refused = guarded.post("/v1/completions", LONG)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    # A stream has begun with 200, so its error is its last event; the others get a status.
    assert [(outcome.status, outcome.error, outcome.done) for outcome in outcomes] == [(200, 503, True)] * 6 + [
        (503, 503, True)
    ] * 3
    guarded.wait_ready()
    answer = guarded.post("/v1/completions", LONG | {"max_tokens": 4})
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert guarded.total("sparse_engine_restarts_total", reason=reason) == restarts + 1
    assert guarded.total("sparse_requests_admitted") == 0
    # Nothing is left of the old engine.
    assert len(guarded.processes()) == len(processes)
    assert {path for path in segments if path.exists()} <= guarded.shared_memory()
