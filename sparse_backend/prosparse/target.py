"""λ found on the way: a controller that steers the L1 weight towards a wanted sparsity instead of following fixed peaks."""

import math
from collections.abc import Mapping
from typing import Any

# At most this factor at a time, as ReMoE's controller has it (arXiv 2412.14711).
_LARGEST_FACTOR = 1.2
# e-folds of λ for each observation in which the sparsity is off by 1. One e-fold moves a trained model by about five points of
# sparsity; with 200 observations in a run this closes a gap of ten points in about a tenth of it.
_GAIN = 1.5
_OBSERVATIONS = 200
# Where the goal stands still: what remains of the run is for the loss to recover under a λ that hardly moves.
_SETTLED = 0.7
_BOUND = 1e4


class SparsityTarget:
    """λ by step, raised while the model is denser than a goal and lowered while it is sparser.

    The goal goes from the first sparsity seen after stage 0 to ``target`` in a straight line, which it reaches after 70 % of the
    steps. What is steered is the sparsity before step 3; the activation threshold adds to it.

    Args:
        target: wanted share of exact zeros in relu(gate)*up, mean over layers.
        steps: the run's optimiser steps.
        relu_steps: T_0, the end of stage 0 (λ = 0).
        start: the first λ; any value within a factor of a hundred of the right one will do.
    """

    def __init__(self, target: float, steps: int, relu_steps: int, start: float) -> None:
        self.target, self.relu_steps = target, relu_steps
        self._steps, self._start = steps, start
        self._every = max(1, (steps - relu_steps) // _OBSERVATIONS)
        self._first: float | None = None
        self._weight = start

    def weight(self, step: int) -> float:
        """λ of optimiser step ``step``, counted from 1."""
        return self._weight if step > self.relu_steps else 0.0

    def is_observed(self, step: int) -> bool:
        """True for the steps whose sparsity ``observe`` wants to know."""
        return step > self.relu_steps and (step - self.relu_steps) % self._every == 0

    def observe(self, step: int, sparsity: float) -> None:
        """Adapt λ to the training sparsity of step ``step``."""
        if self._first is None:
            self._first = sparsity
        progress = min(1.0, (step - self.relu_steps) / (_SETTLED * (self._steps - self.relu_steps)))
        goal = self._first + progress * (self.target - self._first)
        limit = math.log(_LARGEST_FACTOR)
        change = max(-limit, min(limit, _GAIN * (goal - sparsity)))
        lowest, highest = self._start / _BOUND, self._start * _BOUND
        self._weight = max(lowest, min(highest, self._weight * math.exp(change)))

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs in order to go on."""
        return {"weight": self._weight, "first": self._first}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._weight, self._first = state["weight"], state["first"]
