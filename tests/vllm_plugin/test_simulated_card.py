"""On a simulated card both policies are given the same requests, at 90 and then at 120 % of capacity."""

import pytest

from sparse_backend.bench.goodput import Summary
from tests.vllm_plugin.simulated_card import ALL, FCFS, ITL_SLO_MS, replays

LOADS, RATE, SECONDS = (0.9, 1.2), 36.3, 25


@pytest.fixture(scope="module", params=[0, 3])
def summaries(request) -> list[tuple[Summary, Summary]]:
    """Of first come, first served and of ours, by load."""
    of_policies = [list(replays(levers, "mix", RATE, LOADS, SECONDS, seed=request.param)) for levers in (FCFS, ALL)]
    return list(zip(*of_policies, strict=True))


def test_more_requests_have_their_answers_in_time(summaries):
    for fcfs, ours in summaries:
        assert ours["goodput"] >= 1.15 * fcfs["goodput"]
        assert ours["all"]["itl_p99_ms"] <= ITL_SLO_MS


def test_neither_tokens_nor_first_tokens_are_paid_for_it(summaries):
    for fcfs, ours in summaries:
        assert ours["tokens_s"] >= 0.98 * fcfs["tokens_s"]
        assert ours["all"]["ttft_p99_ms"] <= 1.1 * fcfs["all"]["ttft_p99_ms"]
