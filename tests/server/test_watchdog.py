import asyncio

import pytest

from server.watchdog import Watchdog


class Engine:
    def __init__(self) -> None:
        self.now = 1000.0
        self.busy = False
        self.asked = 0
        self.answer = asyncio.Event()
        self.error: Exception | None = None
        self.dog = Watchdog(lambda: self.busy, self.ask, lambda: self.now)

    async def ask(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        await self.answer.wait()

    async def run(self, seconds: float, *, stepping: bool = False) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            if stepping:
                self.dog.step()
            self.dog.tick()
            await asyncio.sleep(0)
            await asyncio.sleep(0)


@pytest.fixture
def engine():
    return Engine()


async def test_an_engine_at_rest_that_answers_owes_nothing(engine):
    engine.answer.set()
    await engine.run(60)
    assert engine.dog.stalled() == 0
    assert 15 <= engine.asked <= 30


async def test_an_engine_that_takes_steps_owes_nothing_and_is_not_asked(engine):
    engine.busy = True
    await engine.run(60, stepping=True)
    assert (engine.dog.stalled(), engine.asked) == (0, 0)


async def test_an_engine_with_work_that_takes_no_step(engine):
    engine.answer.set()
    await engine.run(60)
    engine.busy = True
    await engine.run(9)
    assert engine.dog.stalled() == pytest.approx(9, abs=1)
    engine.dog.step()
    assert engine.dog.stalled() == 0


async def test_an_engine_at_rest_that_does_not_answer_is_asked_once(engine):
    await engine.run(3)
    assert engine.asked == 1
    await engine.run(10)
    assert (engine.dog.stalled(), engine.asked) == (11, 1)
    engine.answer.set()
    await engine.run(1)
    assert engine.dog.stalled() == 0


async def test_an_engine_that_fails_to_answer_owes_one(engine):
    engine.error = RuntimeError("gone")
    await engine.run(10)
    assert engine.dog.stalled() == 8
    assert engine.asked == 9


async def test_nothing_is_waited_for_after_the_end(engine):
    await engine.run(3)
    engine.dog.stop()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
