"""The weight λ of the L1 regulariser over the steps of a run, as pure functions of the step."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Stage:
    """λ reaches ``peak`` at step ``end`` (T_i), counted from 1."""

    end: int
    peak: float


@dataclass(frozen=True)
class L1Schedule:
    """ProSparse's Algorithm 1 (arXiv 2402.13516): λ = 0, then a constant stage, then stages that rise as a sine.

    ``relu_steps`` is T_0, the end of stage 0 (λ = 0). Stage 1 holds its peak; stage i >= 2 rises from the peak before:
    λ(t) = λ_{i-1} + η (λ_i - λ_{i-1}) with η = (sin(-π/2 + π (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2.

    Raises:
        ValueError: peaks that are negative or fall, or steps that do not rise.
    """

    relu_steps: int
    stages: Sequence[Stage]

    def __post_init__(self) -> None:
        ends = [self.relu_steps, *(stage.end for stage in self.stages)]
        peaks = [0.0, *(stage.peak for stage in self.stages)]
        if self.relu_steps < 0 or any(after <= before for before, after in pairwise(ends)):
            raise ValueError(f"the stages' last steps must rise, they are {ends}")
        if not all(math.isfinite(peak) for peak in peaks) or any(after < before for before, after in pairwise(peaks)):
            raise ValueError(f"the stages' λ must be 0 or more and never fall, they are {peaks[1:]}")

    def weight(self, step: int) -> float:
        """λ of optimiser step ``step``, counted from 1; the last peak beyond the last stage."""
        if step <= self.relu_steps or not self.stages:
            return 0.0
        index = bisect_left([stage.end for stage in self.stages], step)
        if index == len(self.stages):
            return self.stages[-1].peak
        stage = self.stages[index]
        if index == 0:
            return stage.peak
        before = self.stages[index - 1]
        progress = (step - before.end) / (stage.end - before.end)
        rise = (math.sin(-math.pi / 2 + math.pi * progress) + 1) / 2
        return before.peak + rise * (stage.peak - before.peak)
