"""Clients that go away in the middle: what they had is free again at once."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from tests.e2e.servers import Server
from tests.e2e.streams import Request

pytestmark = pytest.mark.engine

LONG = {"model": "demo", "prompt": "import ", "max_tokens": 2000, "ignore_eos": True}


def requests(server: Server, count: int, **fields: object) -> list[Request]:
    return [Request(server.port, LONG | fields, server.headers, "/v1/completions") for _ in range(count)]


async def free(server: Server, *names: str) -> float:
    return await asyncio.to_thread(server.wait_until, lambda: not any(map(server.total, names)), 30, f"0 {names}")


def better_of_two(leave: Callable[[], Coroutine[None, None, float]]) -> float:
    """Seconds; once the machine may have had something else to do."""
    return min(asyncio.run(leave()) for _ in range(2))


def test_clients_that_leave_free_what_they_had(server: Server) -> None:
    used = server.total("vllm:kv_cache_usage_perc")

    async def leave() -> float:
        streams = requests(server, 200, stream=True)
        running = [asyncio.create_task(request.run()) for request in streams]
        await asyncio.wait_for(asyncio.gather(*(request.first.wait() for request in streams)), 60)
        assert server.total("vllm:num_requests_running") == 200
        for request in streams:
            request.leave()
        await asyncio.gather(*running)
        return await free(server, "vllm:num_requests_running", "vllm:num_requests_waiting", "sparse_requests_admitted")

    seconds = better_of_two(leave)
    print(f"free after {seconds:.2f} s")
    assert seconds <= 2
    assert server.total("vllm:kv_cache_usage_perc") == used


@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_its_sequence_too(server: Server, waiting) -> None:

    async def leave() -> float:
        # One that fits beside nothing, or one that has to wait behind the 256 sequences that run at once.
        (request,) = requests(server, 1, n=2 if waiting else 1)
        others = requests(server, 32, n=8) if waiting else []
        running = [asyncio.create_task(other.run()) for other in (*others, request)]
        name = "sparse_requests_queued" if waiting else "vllm:num_requests_running"
        await asyncio.to_thread(server.wait_until, lambda: server.total(name) == 1, 30, name)
        request.leave()
        seconds = await free(server, name)
        for other in others:
            other.leave()
        await asyncio.gather(*running)
        await free(server, "vllm:num_requests_running")
        return seconds

    seconds = better_of_two(leave)
    print(f"free after {seconds:.2f} s")
    assert seconds <= 1
