"""How many prompt tokens a step is to carry beside its decodes. Plain data in and out: nothing here knows vLLM."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_backend.vllm_plugin.batching import BatchingSettings
from sparse_backend.vllm_plugin.cost import StepCost, StepShape, union_of

# Tokens of prompts that every step carries, or waiting requests would starve where objectives cannot be met.
_LEAST_CHUNK = 64
_HEADROOM = 0.95  # of the objective; the rest is for the way to the client


@dataclass(frozen=True)
class Decode:
    """A running request whose prompt has been read."""

    context: int
    """Tokens in its cache."""
    density: float
    rows: int = 1
    """Of the next step: the token to continue from, and drafts."""


@dataclass(frozen=True)
class Prefill:
    """A request with prompt tokens to read."""

    start: int
    """Tokens read already."""
    tokens: int
    """To be read."""
    waited_s: float = 0.0


def step_shape(
    decodes: Sequence[Decode], prefills: Sequence[Prefill], chunk: int, after_prefill: bool = False
) -> StepShape:
    """The step that carries all decodes and the first ``chunk`` prompt tokens of ``prefills``."""
    rows = sum(decode.rows for decode in decodes)
    context = sum(decode.context for decode in decodes)
    if not chunk:
        densities = [decode.density for decode in decodes for _ in range(decode.rows)]
        return StepShape(rows, context=context, union=union_of(densities), after_prefill=after_prefill)
    left, prefill_context = chunk, 0
    for prefill in prefills:
        tokens = min(left, prefill.tokens)
        prefill_context += tokens * prefill.start + tokens * tokens // 2
        left -= tokens
        if not left:
            break
    return StepShape(rows + chunk, chunk, context, prefill_context, after_prefill=after_prefill)


@dataclass(frozen=True)
class Planner:
    """Keeps the objectives by the step's predicted time."""

    settings: BatchingSettings
    cost: StepCost

    def chunk(
        self, decodes: Sequence[Decode], prefills: Sequence[Prefill], available: int, after_prefill: bool = False
    ) -> int:
        """The most prompt tokens, of ``available``, with which the next step keeps the ITL objective.

        All of them without an objective, or without decodes that would wait for them. At least 64, or all: where the objective
        is out of reach nobody is to starve for it.
        """
        objective = self.settings.itl_slo_ms
        if objective is None or not decodes:
            return available
        limit = objective * 1e-3 * _HEADROOM

        def keeps(chunk: int) -> bool:
            return self.cost.most_seconds(step_shape(decodes, prefills, chunk, after_prefill)) <= limit

        if available <= _LEAST_CHUNK:
            return available
        low = high = available
        # From above: where the times of small steps vary most, a larger one may keep what the least does not.
        while not keeps(low):
            if low == _LEAST_CHUNK:
                return min(available, max(_LEAST_CHUNK, self._due(decodes, prefills, after_prefill)))
            low, high = max(_LEAST_CHUNK, low // 2), low
        while high - low > max(8, low // 32):
            middle = (low + high) // 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def _due(self, decodes: Sequence[Decode], prefills: Sequence[Prefill], after_prefill: bool) -> int:
        """Where the ITL objective is out of reach: prompt tokens per step with which the first one keeps the TTFT objective."""
        if self.settings.ttft_slo_ms is None:
            return 0
        first = prefills[0]
        left = self.settings.ttft_slo_ms * 1e-3 - first.waited_s
        step = self.cost.seconds(step_shape(decodes, prefills, _LEAST_CHUNK, after_prefill))
        return first.tokens if left <= step else math.ceil(first.tokens * step / left)
