"""A scheduler for real engines that leaves decodes out of every other step while there are prompts to read."""

from collections.abc import Sequence
from typing import Any

from sparse_backend.vllm_plugin.plan import Decode, Planner, Prefill, StepPlan
from sparse_backend.vllm_plugin.scheduler import SparseScheduler

NAME = f"{__name__}.HoldingScheduler"
SETTINGS = '{"policy": "sparse"}'


class HoldingPlanner(Planner):
    """Holds back whatever the cost."""

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
        """Prompts and decodes never share a step."""
        if decodes and available and held_back:
            return StepPlan(0)
        return StepPlan(available, decodes=not (decodes and available and may_hold_back))


class HoldingScheduler(SparseScheduler):
    """Of `SparseScheduler` all but the choice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planner = HoldingPlanner(self._settings, self._planner.cost)

    def shutdown(self) -> None:
        """Without faults, and not in vain."""
        print(f"held back {self.decisions['hold_back']} times, faults {dict(self.fallbacks)}", flush=True)
        super().shutdown()
