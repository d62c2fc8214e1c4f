import asyncio

import pytest

from server import supervisor as module
from server.admission import Admission
from server.health import Health, Phase
from server.limits import AdmissionLimits, Recovery
from server.metrics import ServerMetrics
from server.supervisor import EngineFailedError, Supervisor
from sparse_backend.errors import UserError


class Engine:
    def __init__(self, fate: str) -> None:
        self.fate = fate
        self.killed = self.stopped = False

    @property
    def died(self) -> bool:
        return self.fate == "dies"

    def stalled(self) -> float:
        return 100.0 if self.fate == "hangs" else 0.0

    def tick(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = True

    async def stop(self) -> None:
        self.stopped = True


class World:
    """A supervisor whose engines meet the fates a test gives: dies, hangs, lives, or an exception at the start."""

    def __init__(self, *fates: str | Exception, max_restarts: int = 3) -> None:
        self.fates = list(fates)
        self.engines: list[Engine] = []
        self.closed = 0
        self.stop = asyncio.Event()
        self.health = Health(8)
        self.metrics = ServerMetrics(self.health, Admission(AdmissionLimits()))
        recovery = Recovery(max_restarts=max_restarts)
        self.supervisor = Supervisor(
            recovery, self.health, self.metrics, self.stop, self.start, self.opened, self.count_closed
        )

    async def start(self) -> Engine:
        fate = self.fates.pop(0)
        if isinstance(fate, Exception):
            raise fate
        self.engines.append(Engine(fate))
        return self.engines[-1]

    async def opened(self, engine: Engine) -> None:
        if engine.fate == "breaks":
            raise RuntimeError("gone")
        if engine.fate == "is silent":
            await asyncio.Event().wait()
        self.health.ready(engine)
        if engine.fate == "lives":
            asyncio.get_running_loop().call_later(0.02, self.stop.set)

    def count_closed(self) -> None:
        self.closed += 1

    def restarts(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("sparse_engine_restarts_total", {"reason": reason})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_TICK", 0.001)
    monkeypatch.setattr(module, "_LONGEST_BACKOFF", 0.001)


async def test_a_dead_and_a_hung_engine_are_replaced():
    world = World("dies", "hangs", "lives")
    running = await world.supervisor.run()
    first, second, third = world.engines
    assert running is third
    assert [(engine.killed, engine.stopped) for engine in world.engines] == [(True, True), (True, True), (False, False)]
    assert (world.restarts("died"), world.restarts("hung"), world.closed) == (1, 1, 2)
    assert world.health.refusal() is None
    assert first.died
    assert second.stalled()


async def test_requests_of_the_old_engine_get_time_to_end():
    world = World("dies", "lives")
    world.health.begin_request()
    task = asyncio.create_task(world.supervisor.run())
    await asyncio.sleep(0.02)
    assert world.health.phase is Phase.RESTARTING
    assert (world.engines[0].killed, world.engines[0].stopped) == (True, False)
    world.health.end_request()
    await task
    assert world.engines[0].stopped


async def test_after_so_many_failures_it_gives_up():
    world = World("dies", "hangs", "dies", max_restarts=2)
    with pytest.raises(EngineFailedError, match="failed 3 times"):
        await world.supervisor.run()
    assert (world.restarts("died"), world.restarts("hung")) == (1, 1)


async def test_a_good_run_is_a_new_beginning(monkeypatch):
    monkeypatch.setattr(module, "_GOOD_RUN", -1.0)

    class Late(Engine):
        ticks = 0

        def tick(self) -> None:
            self.ticks += 1

        @property
        def died(self) -> bool:
            return self.fate == "dies" and self.ticks > 1

    monkeypatch.setitem(globals(), "Engine", Late)
    world = World(*["dies"] * 10, "lives", max_restarts=1)
    await world.supervisor.run()
    assert len(world.engines) == 11


async def test_a_first_start_that_fails_is_the_end():
    with pytest.raises(EngineFailedError, match="did not start: no memory"):
        await World(RuntimeError("no\nmemory")).supervisor.run()


async def test_a_later_start_that_fails_is_tried_again():
    world = World("dies", RuntimeError("no memory"), "lives")
    await world.supervisor.run()
    assert len(world.engines) == 2
    assert world.restarts("died") == 2


@pytest.mark.parametrize("fate", ["breaks", "is silent"])
async def test_an_engine_that_fails_as_it_is_opened_is_ended(fate, monkeypatch):
    monkeypatch.setattr(module, "_OPEN_LIMIT", 0.05)
    world = World("dies", fate, "lives")
    await world.supervisor.run()
    assert [engine.stopped for engine in world.engines] == [True, True, False]
    assert world.engines[1].killed


async def test_what_the_user_got_wrong_is_told_at_once():
    with pytest.raises(UserError):
        await World(UserError("--x is wrong")).supervisor.run()


async def test_a_stop_ends_the_wait_for_the_next_start(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_BACKOFF", 30.0)
    world = World("dies")
    asyncio.get_running_loop().call_later(0.05, world.stop.set)
    assert await asyncio.wait_for(world.supervisor.run(), 1) is None
    assert world.restarts("died") == 0
