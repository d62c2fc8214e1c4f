import asyncio
import tracemalloc

import pytest

from server.admission import Admission, DrainRate
from server.errors import RETRY_AFTER, RefusalError
from server.limits import AdmissionLimits
from server.policy import Work

ONE = Work(sequences=1, prompt_tokens=10, output_tokens=10)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def queue(clock, *, running=1, **limits) -> Admission:
    return Admission(AdmissionLimits(max_running=running, **limits), clock)


async def settle() -> None:
    """Until every task has heard of what has happened."""
    for _ in range(5):
        await asyncio.sleep(0)


class Clients:
    """Requests that ask for admission, in order; notes who is given a turn."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.turns: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *names: str, work: Work = ONE) -> None:
        """Each name is a key's, with anything behind a dash."""
        for name in names:
            self.tasks.append(asyncio.create_task(self._enter(name, work), name=name))
        await settle()

    async def _enter(self, name: str, work: Work) -> None:
        await self.admission.enter(name.split("-")[0], work)
        self.turns.append(name)

    async def leave(self, times: int = 1, work: Work = ONE) -> None:
        for _ in range(times):
            self.admission.leave(work)
            await settle()

    def refused(self) -> list[str]:
        return [task.get_name() for task in self.tasks if task.done() and task.exception() is not None]


async def test_as_many_sequences_run_as_may(clock):
    clients = Clients(queue(clock, running=3))
    await clients.ask("a-1", "a-2", "a-3", "a-4", "a-5")
    assert clients.turns == ["a-1", "a-2", "a-3"]
    assert (clients.admission.running_requests, clients.admission.queued_requests) == (3, 2)
    assert clients.admission.queued_tokens == 40
    await clients.leave(3)
    assert clients.turns == ["a-1", "a-2", "a-3", "a-4", "a-5"]
    assert (clients.admission.running_requests, clients.admission.queued_requests) == (2, 0)


async def test_a_request_of_more_sequences_than_run_at_once_runs_alone(clock):
    large = Work(sequences=100, prompt_tokens=1, output_tokens=1)
    clients = Clients(queue(clock, running=4))
    await clients.ask("a-1")
    await clients.ask("b-large", work=large)
    await clients.ask("a-2")
    assert clients.turns == ["a-1"]
    await clients.leave()
    assert clients.turns == ["a-1", "b-large"]
    await clients.leave(work=large)
    assert clients.turns == ["a-1", "b-large", "a-2"]


async def test_past_the_queue_is_429_with_the_measured_time_to_drain(clock):
    clients = Clients(queue(clock, queue_requests=2))
    await clients.ask("a", "a", "a", "a-refused")
    (refused,) = (task.exception() for task in clients.tasks if task.get_name() == "a-refused")
    assert isinstance(refused, RefusalError)
    assert (refused.status, refused.reason, refused.retry_after) == (429, "queue_requests", RETRY_AFTER)
    # Two requests end in ten seconds: three that wait take fifteen.
    await clients.leave()
    clock.now += 10
    await clients.leave()
    await clients.ask("a", "a")
    with pytest.raises(RefusalError) as caught:
        clients.admission.check("a")
    assert caught.value.retry_after == 15


async def test_tokens_bound_the_queue_too(clock):
    clients = Clients(queue(clock, queue_tokens=50))
    await clients.ask("a-1", "a-2", "a-3", "a-4")
    assert clients.refused() == ["a-4"]
    assert clients.tasks[-1].exception().reason == "queue_tokens"


async def test_without_a_queue_a_request_runs_or_is_refused(clock):
    clients = Clients(queue(clock, queue_requests=0))
    await clients.ask("a-1", "a-2")
    assert (clients.turns, clients.refused()) == (["a-1"], ["a-2"])


async def test_two_keys_take_turns_however_many_wait(clock):
    clients = Clients(queue(clock))
    await clients.ask(*(f"a-{n}" for n in range(5)))
    await clients.ask("b-0", "b-1")
    await clients.leave(4)
    assert set(clients.turns[1:5]) == {"a-1", "a-2", "b-0", "b-1"}, clients.turns


async def test_a_key_with_longer_requests_is_given_fewer(clock):
    clients = Clients(queue(clock))
    await clients.ask("c-runs")
    await clients.ask(*(f"a-{n}" for n in range(4)), work=Work(1, 0, 300))
    await clients.ask(*(f"b-{n}" for n in range(12)), work=Work(1, 0, 100))
    await clients.leave(8)
    given = [turn.split("-")[0] for turn in clients.turns[1:]]
    assert (given.count("a"), given.count("b")) == (2, 6), clients.turns


async def test_a_key_with_less_waiting_takes_the_place_of_one_with_more(clock):
    clients = Clients(queue(clock, queue_requests=4))
    await clients.ask(*(f"a-{n}" for n in range(5)))
    clients.admission.check("b")
    await clients.ask("b-0", "b-1", "b-2")
    assert clients.refused() == ["a-3", "a-4", "b-2"]
    with pytest.raises(RefusalError):
        clients.admission.check("b")
    await clients.leave(4)
    assert sorted(clients.turns) == ["a-0", "a-1", "a-2", "b-0", "b-1"]


async def test_a_client_that_goes_away_leaves_the_queue(clock):
    clients = Clients(queue(clock))
    await clients.ask("a-1", "a-2", "a-3")
    clients.tasks[1].cancel()
    await settle()
    assert clients.admission.queued_requests == 1
    await clients.leave()
    assert clients.turns == ["a-1", "a-3"]


@pytest.mark.parametrize("turn_first", [True, False])
async def test_a_turn_given_in_the_instant_of_going_away_is_handed_on(clock, turn_first):
    clients = Clients(queue(clock))
    await clients.ask("a-1", "a-2", "a-3")
    instant = [lambda: clients.admission.leave(ONE), clients.tasks[1].cancel]
    for event in instant if turn_first else reversed(instant):
        event()
    await settle()
    assert clients.turns == ["a-1", "a-3"]
    assert (clients.admission.running_requests, clients.admission.queued_requests) == (1, 0)


async def test_one_that_goes_away_in_the_instant_of_being_sent_away_is_just_gone(clock):
    clients = Clients(queue(clock))
    await clients.ask("a-1", "a-2")
    clients.tasks[1].cancel()
    clients.admission.refuse_waiting(RefusalError(503, "gone"))
    await asyncio.wait(clients.tasks)
    assert clients.tasks[1].cancelled()
    assert (clients.admission.running_requests, clients.admission.queued_requests) == (1, 0)


async def test_everybody_who_waits_can_be_sent_away(clock):
    clients = Clients(queue(clock))
    await clients.ask("a-1", "a-2", "b-1")
    clients.admission.refuse_waiting(RefusalError(503, "gone"))
    await settle()
    assert clients.refused() == ["a-2", "b-1"]
    assert clients.admission.queued_requests == 0
    await clients.leave()
    await clients.ask("a-3")
    assert clients.turns == ["a-1", "a-3"]


def test_the_drain_rate_forgets(clock):
    rate = DrainRate(clock)
    rate.count()
    clock.now += 5
    assert rate.seconds_for(3) == 15
    assert rate.seconds_for(1000) == 120
    clock.now += 60
    assert rate.seconds_for(3) == RETRY_AFTER


def test_the_drain_rate_keeps_no_more_than_its_window_where_nobody_asks_for_it(clock):
    rate = DrainRate(clock)

    def memory_of(seconds: int) -> int:
        tracemalloc.start()
        for _ in range(100 * seconds):
            clock.now += 0.01
            rate.count()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size

    memory_of(60)
    assert memory_of(600) < 300_000
    assert rate.seconds_for(100) == 1
