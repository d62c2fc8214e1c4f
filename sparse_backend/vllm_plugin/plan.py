"""What a step is to carry: how many tokens of prompts, which waiting requests go first, and whether more are let in.

Plain data in and out: nothing here knows vLLM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_backend.vllm_plugin.batching import BatchingSettings, Decision
from sparse_backend.vllm_plugin.cost import StepCost, StepShape, union_of

_LEAST_CHUNK = (
    64  # tokens of prompts that every step carries, or waiting requests would starve where objectives cannot be met
)
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
    """A request with prompt tokens to read: running, or waiting to."""

    id: str
    start: int
    """Tokens read already."""
    tokens: int
    """To be read."""
    density: float = 0.0
    """Predicted."""
    waited_s: float = 0.0


@dataclass(frozen=True)
class Load:
    """All there is to do."""

    decodes: Sequence[Decode]
    prefills: Sequence[Prefill]
    """Running."""
    waiting: Sequence[Prefill]
    """In the order of their arrival."""
    most_tokens: int
    """vLLM's limit for a step."""


@dataclass(frozen=True)
class Plan:
    """What to do in the next step."""

    prefill_tokens: int
    """At most."""
    admit: bool
    """Whether waiting requests are let in."""
    order: Sequence[str]
    """Of the waiting requests."""
    decisions: Sequence[Decision]


@dataclass
class Planner:
    """Plans step after step."""

    settings: BatchingSettings
    cost: StepCost
    overtaken_s: dict[str, float] = field(default_factory=dict)
    """Per waiting request, the time that requests which came later and went first are predicted to have cost it."""

    def plan(self, load: Load) -> Plan:
        """The next step."""
        decisions: list[Decision] = []
        order = list(load.waiting)
        if {"sparsest", "shortest"} & self.settings.levers:
            order = self._order(order, decisions)
        pending = [*load.prefills, *order]
        available = min(load.most_tokens, sum(prefill.tokens for prefill in pending))
        chunk = self._chunk(load.decodes, pending, available) if "chunk" in self.settings.levers else load.most_tokens
        if available:
            decisions.append("chunk_cut" if chunk < available else "chunk_full")
        admit = not self._holds(load)
        if not admit:
            decisions.append("hold")
        return Plan(chunk, admit, [prefill.id for prefill in order], decisions)

    def shape(self, decodes: Sequence[Decode], pending: Sequence[Prefill], chunk: int) -> StepShape:
        """The step that carries all decodes and the first ``chunk`` prompt tokens of ``pending``."""
        rows = sum(decode.rows for decode in decodes)
        context = sum(decode.context for decode in decodes)
        if not chunk:
            densities = [decode.density for decode in decodes for _ in range(decode.rows)]
            return StepShape(rows, context=context, union=union_of(densities))
        left, prefill_context = chunk, 0
        for prefill in pending:
            tokens = min(left, prefill.tokens)
            prefill_context += tokens * prefill.start + tokens * tokens // 2
            left -= tokens
            if not left:
                break
        return StepShape(rows + chunk, chunk, context, prefill_context)

    def _chunk(self, decodes: Sequence[Decode], pending: Sequence[Prefill], available: int) -> int:
        """The most prompt tokens with which the step keeps the ITL objective."""
        objective = self.settings.itl_slo_ms
        if objective is None or not decodes:
            return available
        limit = objective * 1e-3 * _HEADROOM

        def keeps(chunk: int) -> bool:
            return self.cost.most_seconds(self.shape(decodes, pending, chunk)) <= limit

        if available <= _LEAST_CHUNK or keeps(available):
            return available
        if not keeps(_LEAST_CHUNK):
            return min(available, max(_LEAST_CHUNK, self._due(decodes, pending)))
        low, high = _LEAST_CHUNK, available
        while high - low > max(8, low // 32):
            middle = (low + high) // 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    def _due(self, decodes: Sequence[Decode], pending: Sequence[Prefill]) -> int:
        """Where the ITL objective is out of reach: prompt tokens per step with which the first one keeps the TTFT objective."""
        if self.settings.ttft_slo_ms is None:
            return 0
        first = pending[0]
        left = self.settings.ttft_slo_ms * 1e-3 - first.waited_s
        step = self.cost.seconds(self.shape(decodes, pending, _LEAST_CHUNK))
        return first.tokens if left <= step else math.ceil(first.tokens * step / left)

    def _holds(self, load: Load) -> bool:
        if not load.waiting or not load.decodes:
            return False
        waited = load.waiting[0].waited_s
        if waited >= self.settings.max_unfairness_ms * 1e-3:
            return False
        if "cap" in self.settings.levers and self.settings.itl_slo_ms is not None:
            first = load.waiting[0]
            decodes = [*load.decodes, Decode(first.start + first.tokens, first.density)]
            decodes += [Decode(prefill.start + prefill.tokens, prefill.density) for prefill in load.prefills]
            limit = self.settings.itl_slo_ms * 1e-3 * _HEADROOM
            if self.cost.most_seconds(self.shape(decodes, [], 0)) > limit:
                return True
        return (
            "bunch" in self.settings.levers
            and not load.prefills
            and self.cost.path(self.shape(load.decodes, [], 0)) == "sparse"
        )

    def _order(self, waiting: list[Prefill], decisions: list[Decision]) -> list[Prefill]:
        """Sparser requests first, as far as none of those overtaken waits longer for it than it may."""
        self.overtaken_s = {prefill.id: self.overtaken_s.get(prefill.id, 0.0) for prefill in waiting}
        best = min(waiting, key=self._rank, default=None)
        if best is None or best is waiting[0]:
            return waiting
        index = waiting.index(best)
        earlier = waiting[:index]
        cost = self.cost.seconds(self.shape([], [best], best.tokens)) if best.tokens else 0.0
        window = self.settings.max_unfairness_ms * 1e-3
        if any(self.overtaken_s[prefill.id] + cost > window for prefill in earlier):
            return waiting
        for prefill in earlier:
            self.overtaken_s[prefill.id] += cost
        decisions.append("overtake")
        return [best, *earlier, *waiting[index + 1 :]]

    def _rank(self, prefill: Prefill) -> float:
        return prefill.tokens if "shortest" in self.settings.levers else prefill.density
