"""The order of waiting requests, without an engine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from sparse_backend.vllm_plugin.turns import TurnQueue, turn

arrivals = st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 4000)), min_size=1, max_size=30)
"""Seconds since the one before, prompt tokens."""


def request(name: str, tokens: int = 1) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[7] * tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
    )


def order(came: list[tuple[float, int]], most_s: float) -> list[int]:
    """Who of those that came is let in when, all waiting until the last has come."""
    arrived = dict(enumerate(at for at, _ in came))
    queue = TurnQueue(lambda waiting: turn(arrived[int(waiting.request_id)], waiting.num_prompt_tokens, most_s))
    for index, (_, tokens) in enumerate(came):
        queue.add_request(request(str(index), tokens))
    return [int(queue.pop_request().request_id) for _ in came]


def at_times(gaps: list[tuple[float, int]]) -> list[tuple[float, int]]:
    now, came = 0.0, []
    for gap, tokens in gaps:
        now += gap
        came.append((now, tokens))
    return came


@settings(deadline=None)
@given(gaps=arrivals, most_s=st.sampled_from([0.0, 0.1, 1.0]))
def test_only_shorter_prompts_overtake_and_only_within_the_bound(gaps: list[tuple[float, int]], most_s: float) -> None:
    came = at_times(gaps)
    let_in = order(came, most_s)
    assert sorted(let_in) == list(range(len(came)))
    for place, first in enumerate(let_in):
        for later in let_in[place + 1 :]:
            if first > later:
                assert came[first][0] - came[later][0] < most_s
                assert came[first][1] < came[later][1]
    assert most_s or let_in == list(range(len(came)))


def test_a_short_prompt_goes_first_until_the_long_one_has_waited() -> None:
    long, short = 600, 100
    assert order([(0.0, long), (0.4, short)], 1.0) == [1, 0]
    assert order([(0.0, long), (0.6, short)], 1.0) == [0, 1]
    assert order([(0.0, long), (0.4, short)], 0.2) == [0, 1]
    assert order([(0.0, long), (0.0, long), (0.1, short), (0.1, short)], 1.0) == [2, 3, 0, 1]


@pytest.mark.parametrize("status", [RequestStatus.PREEMPTED, RequestStatus.WAITING])
def test_a_preempted_request_stays_in_front(status: RequestStatus) -> None:
    queue = TurnQueue(lambda waiting: turn(0.0, waiting.num_prompt_tokens, 1.0))
    back = request("back", 500)
    back.status = status
    queue.prepend_request(back)
    queue.add_request(request("new", 10))
    first = "back" if status == RequestStatus.PREEMPTED else "new"
    assert queue.peek_request().request_id == first
