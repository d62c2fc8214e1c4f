import asyncio

import httpx
import pytest
from fastapi import FastAPI

from server.app import operations_app
from server.errors import RETRY_AFTER
from server.health import FrontDoor, Health, Phase, probe_router

LIMIT = 8.0


class Engine:
    died = False
    seconds = 0.0

    def stalled(self) -> float:
        return self.seconds


class World:
    """A front door with a slow API behind it and an engine that can be made to fail."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.entered, self.release = asyncio.Event(), asyncio.Event()
        self.health = Health(LIMIT)
        self.door = FrontDoor(self.health, operations_app([probe_router(self.health)]))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.door), base_url="http://server")

    def open(self) -> None:
        api = FastAPI()

        @api.get("/quick")
        async def quick():
            return "done"

        @api.get("/slow")
        async def slow():
            self.entered.set()
            await self.release.wait()
            return "done"

        @api.get("/broken")
        async def broken():
            raise RuntimeError

        self.door.api = api
        self.health.ready(self.engine)

    async def statuses(self, *paths: str) -> list[int]:
        return [(await self.client.get(path)).status_code for path in paths]


@pytest.fixture
async def world():
    world = World()
    async with world.client:
        yield world


async def test_while_starting_only_the_probes_answer(world):
    assert await world.statuses("/livez", "/readyz", "/health", "/quick", "/unknown") == [200, 503, 503, 503, 503]
    world.health.step = "loading"
    assert (await world.client.get("/readyz")).json()["reason"] == "The server is not ready yet: loading."
    refused = await world.client.get("/v1/models")
    assert refused.headers["retry-after"] == str(RETRY_AFTER)
    assert refused.json()["error"] == {
        "message": "The server is not ready yet: loading.",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }


async def test_once_ready_requests_come_in(world):
    world.open()
    assert await world.statuses("/livez", "/readyz", "/health", "/quick", "/unknown") == [200, 200, 200, 200, 404]


async def test_a_dead_engine_turns_readiness_at_once(world):
    world.open()
    world.engine.died = True
    assert await world.statuses("/livez", "/readyz", "/quick") == [200, 503, 503]


@pytest.mark.parametrize(("seconds", "status"), [(0, 200), (LIMIT, 200), (LIMIT + 1, 503)])
async def test_an_engine_that_makes_no_progress_is_not_ready_and_given_nothing(world, seconds, status):
    world.open()
    world.engine.seconds = seconds
    assert await world.statuses("/livez", "/readyz", "/quick") == [200, status, status]
    assert world.health.stalled_seconds == seconds


async def test_while_a_new_engine_is_started_requests_are_refused(world):
    world.open()
    world.health.restarting()
    world.door.api = None
    assert await world.statuses("/livez", "/readyz", "/quick") == [200, 503, 503]
    assert "started anew" in (await world.client.get("/readyz")).json()["reason"]
    assert world.health.stalled_seconds == 0
    world.open()
    assert await world.statuses("/readyz", "/quick") == [200, 200]


async def test_draining_refuses_new_requests_and_waits_for_running_ones(world):
    world.open()
    slow = asyncio.create_task(world.client.get("/slow"))
    await world.entered.wait()
    assert world.health.running == 1
    world.health.drain()
    assert world.health.phase is Phase.DRAINING
    assert await world.statuses("/livez", "/readyz", "/quick") == [200, 503, 503]
    idle = asyncio.create_task(world.health.idle())
    await asyncio.sleep(0.01)
    assert not idle.done()
    world.release.set()
    await asyncio.wait_for(idle, 1)
    assert (await slow).status_code == 200


async def test_a_request_that_fails_is_counted_out(world):
    world.open()
    with pytest.raises(RuntimeError):
        await world.client.get("/broken")
    assert world.health.running == 0
    await asyncio.wait_for(world.health.idle(), 1)
