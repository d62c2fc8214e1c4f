"""What a replay amounts to: how many requests met the objectives, and the times they took."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from sparse_backend.bench.replay import Outcome


@dataclass(frozen=True)
class Objectives:
    """What a request must meet to count: its first token, and 99 of 100 of its times between tokens. None: anything will do."""

    ttft_s: float | None
    itl_s: float | None

    def met_by(self, outcome: Outcome) -> bool:
        """Did a request have its answer in time?"""
        if outcome.ttft_s is None or outcome.status != 200:
            return False
        in_time = self.ttft_s is None or outcome.ttft_s <= self.ttft_s
        return in_time and (self.itl_s is None or quantile(outcome.itl_s, 0.99) <= self.itl_s)


class Times(TypedDict):
    """Of one class, or of all requests; milliseconds, over requests for TTFT and over tokens for ITL."""

    requests: int
    good: float
    """Share that met the objectives."""
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


class Summary(TypedDict):
    """One replay."""

    goodput: float
    """Requests per second that met the objectives."""
    tokens_s: float
    """Answered tokens per second, from the first request sent to the last answer."""
    merged: float
    """Share of the tokens that came with the one before, because the server was late to send that; ITL leaves them out."""
    rejected: int
    """Answered 429 or 503."""
    failed: int
    """Answered otherwise than 200, or not at all."""
    fairness: float
    """Jain's index over the classes' shares of good requests: 1 if they are the same, 1 / classes if one has them all."""
    all: Times
    classes: dict[str, Times]


def summarise(outcomes: Sequence[Outcome], objectives: Objectives) -> Summary:
    """Count it up."""
    seconds = max(outcome.ended_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes)
    names = list(dict.fromkeys(outcome.traffic_class for outcome in outcomes))
    classes = {name: _times([o for o in outcomes if o.traffic_class == name], objectives) for name in sorted(names)}
    everything = _times(outcomes, objectives)
    tokens = sum(outcome.tokens for outcome in outcomes)
    events = sum(1 + len(outcome.itl_s) for outcome in outcomes if outcome.tokens)
    return {
        "goodput": everything["good"] * len(outcomes) / seconds,
        "tokens_s": tokens / seconds,
        "merged": 1 - events / tokens if tokens else 0.0,
        "rejected": sum(outcome.status in (429, 503) for outcome in outcomes),
        "failed": sum(outcome.status not in (200, 429, 503) for outcome in outcomes),
        "fairness": _jain([times["good"] for times in classes.values()]),
        "all": everything,
        "classes": classes,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of them do not exceed; 0 without any."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _times(outcomes: Sequence[Outcome], objectives: Objectives) -> Times:
    ttft = [1e3 * outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    itl = [1e3 * gap for outcome in outcomes for gap in outcome.itl_s]
    return {
        "requests": len(outcomes),
        "good": statistics.mean(objectives.met_by(outcome) for outcome in outcomes),
        "ttft_p50_ms": quantile(ttft, 0.5),
        "ttft_p99_ms": quantile(ttft, 0.99),
        "itl_p50_ms": quantile(itl, 0.5),
        "itl_p99_ms": quantile(itl, 0.99),
    }


def _jain(shares: Sequence[float]) -> float:
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
