import pytest

from sparse_backend.bench.goodput import Objectives, quantile, summarise
from sparse_backend.bench.replay import Outcome


def answer(name: str, ttft_s: float, itl_s: list[float], *, sent_s: float = 0.0, ended_s: float = 10.0) -> Outcome:
    return Outcome(name, sent_s, 200, ttft_s, itl_s, len(itl_s) + 1, ended_s)


def test_a_request_is_good_if_its_first_token_and_99_of_100_gaps_are_in_time() -> None:
    objectives = Objectives(ttft_s=1.0, itl_s=0.05)
    steady = [0.05] * 199
    assert objectives.met_by(answer("a", 1.0, steady))
    assert objectives.met_by(answer("a", 1.0, [*steady, 0.2]))
    assert not objectives.met_by(answer("a", 1.0, [*steady, 0.2, 0.2, 0.2]))
    assert not objectives.met_by(answer("a", 1.01, steady))
    # Of few gaps, none may be late.
    assert not objectives.met_by(answer("a", 0.1, [0.01, 0.01, 0.06]))
    assert objectives.met_by(answer("a", 0.1, []))
    assert not objectives.met_by(Outcome("a", 0.0, 429))
    assert Objectives(None, None).met_by(answer("a", 99.0, [99.0]))


def test_summary_counts_requests_tokens_and_refusals() -> None:
    outcomes = [
        answer("a", 0.1, [0.01, 0.03], sent_s=0.0, ended_s=2.0),
        answer("a", 5.0, [0.01], sent_s=1.0, ended_s=20.0),
        answer("b", 0.2, [0.02], sent_s=1.0, ended_s=3.0),
        Outcome("b", 2.0, 429, ended_s=2.0),
        Outcome("b", 2.0, 503, ended_s=2.0),
        Outcome("b", 2.0, 0, ended_s=2.0),
    ]
    summary = summarise(outcomes, Objectives(1.0, 0.05))
    assert summary["goodput"] == pytest.approx(2 / 20)
    assert summary["tokens_s"] == pytest.approx(7 / 20)
    assert summary["merged"] == 0
    assert (summary["rejected"], summary["failed"]) == (2, 1)
    assert summary["classes"]["a"]["good"] == 0.5
    assert summary["classes"]["b"]["good"] == 0.25
    # Jain: (0.5 + 0.25)^2 / (2 (0.25 + 0.0625))
    assert summary["fairness"] == pytest.approx(0.9)
    assert summary["all"]["ttft_p50_ms"] == pytest.approx(200)
    assert summary["all"]["itl_p99_ms"] == pytest.approx(30)


def test_tokens_that_came_together_are_counted_and_said() -> None:
    in_two_events = Outcome("a", 0.0, 200, 0.1, [0.05], tokens=8, ended_s=2.0)
    summary = summarise([in_two_events, answer("a", 0.1, [0.01], ended_s=2.0)], Objectives(None, None))
    assert summary["tokens_s"] == pytest.approx(10 / 2)
    assert summary["merged"] == pytest.approx(6 / 10)
    assert summarise([Outcome("a", 0.0, 429, ended_s=1.0)], Objectives(None, None))["merged"] == 0


def test_fairness_of_classes_that_all_went_without() -> None:
    assert summarise([answer("a", 2, []), answer("b", 2, [])], Objectives(1.0, None))["fairness"] == 1.0


def test_quantiles() -> None:
    assert quantile(list(range(100, 0, -1)), 0.5) == 51
    assert quantile(list(range(1, 101)), 0.99) == 100
    assert quantile([], 0.5) == 0.0
