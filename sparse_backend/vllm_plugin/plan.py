"""What a step is to carry: how many prompt tokens, and whether decodes beside them. Plain data in and out: nothing knows vLLM."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sparse_backend.vllm_plugin.batching import BatchingSettings
from sparse_backend.vllm_plugin.cost import StepCost, StepShape, union_of

# Tokens of prompts that every step carries, or waiting requests would starve where objectives cannot be met.
_LEAST_CHUNK = 64
_HEADROOM = 0.95  # of the objective
# Seconds per decode that a step is to be shorter: on the way to the clients one process handles its tokens one after the other.
# On an H200 with 260 of them the 99th percentile of what clients saw was 16 ms above the steps' own.
_TO_CLIENT = 6e-5
# Predicted prompt tokens per second with steps of their own, over those beside decodes: less is within what predictions miss.
_LEAST_GAIN = 1.03


class Decode(NamedTuple):
    """A running request whose prompt has been read."""

    context: int
    """Tokens in its cache."""
    density: float
    rows: int = 1
    """Of the next step: the token to continue from, and drafts."""


class Prefill(NamedTuple):
    """A request with prompt tokens to read."""

    start: int
    """Tokens read already."""
    tokens: int
    """To be read."""
    waited_s: float = 0.0
    fits: bool = True
    """Whether there is memory and a place for it, beside those before it."""


@dataclass(frozen=True)
class StepPlan:
    """Of the next step."""

    prompt_tokens: int
    """At most."""
    decodes: bool = True
    """Whether running requests get a token, or wait for the step after it."""


def step_shape(
    decodes: Sequence[Decode], prefills: Sequence[Prefill], chunk: int, after_prefill: bool = False
) -> StepShape:
    """The step that carries all decodes and the first ``chunk`` prompt tokens of ``prefills``."""
    return _with_prompts(_decoding(decodes, after_prefill), prefills, chunk)


def _decoding(decodes: Sequence[Decode], after_prefill: bool) -> StepShape:
    densities = [decode.density for decode in decodes for _ in range(decode.rows)]
    context = sum(decode.context for decode in decodes)
    return StepShape(len(densities), context=context, union=union_of(densities), after_prefill=after_prefill)


def _with_prompts(step: StepShape, prefills: Sequence[Prefill], chunk: int) -> StepShape:
    if not chunk:
        return step
    left, prefill_context = chunk, 0
    for prefill in prefills:
        tokens = min(left, prefill.tokens)
        prefill_context += tokens * prefill.start + tokens * tokens // 2
        left -= tokens
        if not left:
            break
    return replace(step, rows=step.rows + chunk, prefill_tokens=chunk, prefill_context=prefill_context, union=1.0)


@dataclass(frozen=True)
class Planner:
    """Keeps the objectives by the step's predicted time, and reads prompts as fast as they allow."""

    settings: BatchingSettings
    cost: StepCost

    def plan(
        self,
        decodes: Sequence[Decode],
        prefills: Sequence[Prefill],
        available: int,
        *,
        after_prefill: bool = False,
        held_back: bool = False,
        may_hold_back: bool = True,
    ) -> StepPlan:
        """The next step.

        Prompts share it with the decodes, or have it for themselves and the decodes the one after: the same tokens in two
        steps. Attention to many decodes' contexts is slower in one launch with prompts, weights are read once more in two
        steps; which is faster is predicted. Either way a piece is as large as the ITL objective leaves room for, all of
        ``available`` without one.

        Args:
            decodes: running requests that would get a token.
            prefills: those with prompt tokens to read, first come first.
            available: prompt tokens there are to read.
            after_prefill: whether the step before read prompts.
            held_back: whether the step before left decodes out.
            may_hold_back: whether this one may.
        """
        if not decodes or not available:
            return StepPlan(available)
        if held_back:
            return StepPlan(0)
        decoding, nothing = _decoding(decodes, after_prefill), StepShape(0, after_prefill=after_prefill)
        afterwards = replace(decoding, after_prefill=True)

        def together(chunk: int) -> list[StepShape]:
            return [_with_prompts(decoding, prefills, chunk)]

        def apart(chunk: int) -> list[StepShape]:
            return [_with_prompts(nothing, prefills, chunk), afterwards]

        limit = self._limit(decoding.rows)
        beside = self._most(together, available, limit) or self._due(prefills, available, together)
        # What does not fit is waited for in steps that carry decodes: only they make room.
        fitting = min(available, sum(prefill.tokens for prefill in prefills if prefill.fits))
        if may_hold_back and fitting and all(self.cost.knows(step) for step in apart(fitting)):
            alone = self._most(apart, fitting, limit)
            if self._rate(apart, alone) > _LEAST_GAIN * self._rate(together, min(beside, fitting)):
                return StepPlan(alone, decodes=False)
        return StepPlan(beside)

    def _limit(self, rows: int) -> float:
        """Seconds between two tokens as they leave the engine."""
        objective = self.settings.itl_slo_ms
        return math.inf if objective is None else objective * 1e-3 * _HEADROOM - rows * _TO_CLIENT

    def _most(self, steps: Callable[[int], list[StepShape]], available: int, limit: float) -> int:
        """The most prompt tokens with which the steps together take no longer than ``limit``; 0 if 64 take longer."""
        if limit == math.inf or available <= _LEAST_CHUNK:
            return available

        def keeps(chunk: int) -> bool:
            times = [self.cost.times(step) for step in steps(chunk)]
            # Of two steps in a row it is seldom both that are late.
            return sum(expected for expected, _ in times) + max(most - expected for expected, most in times) <= limit

        low = high = available
        # From above: where the times of small steps vary most, a larger one may keep what the least does not.
        while not keeps(low):
            if low == _LEAST_CHUNK:
                return 0
            low, high = max(_LEAST_CHUNK, low // 2), low
        while high - low > max(8, low // 32):
            middle = (low + high) // 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def _rate(self, steps: Callable[[int], list[StepShape]], chunk: int) -> float:
        """Prompt tokens per second."""
        return chunk / sum(map(self.cost.seconds, steps(chunk)))

    def _due(self, prefills: Sequence[Prefill], available: int, steps: Callable[[int], list[StepShape]]) -> int:
        """Where the ITL objective is out of reach: prompt tokens per step with which the first one keeps the TTFT objective.

        At least 64, or all: nobody is to starve for an objective.
        """
        if self.settings.ttft_slo_ms is None:
            return min(available, _LEAST_CHUNK)
        first = prefills[0]
        left = self.settings.ttft_slo_ms * 1e-3 - first.waited_s
        step = sum(map(self.cost.seconds, steps(_LEAST_CHUNK)))
        due = first.tokens if left <= step else math.ceil(first.tokens * step / left)
        return min(available, max(_LEAST_CHUNK, due))
