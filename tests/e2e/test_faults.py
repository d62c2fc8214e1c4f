"""A real engine killed or stopped under load, and clients that leave: the server comes back, and nobody hangs."""

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


def test_clients_that_leave_free_what_they_had(guarded: Server) -> None:
    guarded.wait_ready()
    used = guarded.total("vllm:kv_cache_usage_perc")

    async def leave() -> None:
        streams = requests(guarded, 200, stream=True)
        running = [asyncio.create_task(request.run()) for request in streams]
        await asyncio.wait_for(asyncio.gather(*(request.first.wait() for request in streams)), 60)
        assert guarded.total("vllm:num_requests_running") == 200
        for request in streams:
            request.leave()
        await asyncio.gather(*running)

    asyncio.run(leave())
    busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "sparse_requests_admitted")
    seconds = guarded.wait_until(lambda: not any(map(guarded.total, busy)), 2, "empty")
    print(f"empty after {seconds:.2f} s")
    assert guarded.total("vllm:kv_cache_usage_perc") == used


@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_its_sequence_too(guarded: Server, waiting) -> None:
    guarded.wait_ready()

    async def leave() -> None:
        # One that fits beside nothing, or one that has to wait behind the 256 sequences that run at once.
        (request,) = requests(guarded, 1, n=2 if waiting else 1, temperature=1)
        others = requests(guarded, 32, n=8, temperature=1) if waiting else []
        running = [asyncio.create_task(other.run()) for other in (*others, request)]
        name = "sparse_requests_queued" if waiting else "vllm:num_requests_running"
        await asyncio.to_thread(guarded.wait_until, lambda: guarded.total(name) == 1, 20, name)
        request.leave()
        seconds = await asyncio.to_thread(guarded.wait_until, lambda: guarded.total(name) == 0, 1, f"0 {name}")
        print(f"free after {seconds:.2f} s")
        for other in others:
            other.leave()
        await asyncio.gather(*running)

    asyncio.run(leave())
    guarded.wait_until(lambda: guarded.total("vllm:num_requests_running") == 0, 2, "empty")
