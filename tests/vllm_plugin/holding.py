"""A scheduler for real engines that leaves decodes out of every other step while there are prompts to read."""

from sparse_backend.vllm_plugin.cost import LayerTable, StepCost, StepShape
from sparse_backend.vllm_plugin.scheduler import SparseScheduler

NAME = f"{__name__}.HoldingScheduler"
SETTINGS = '{"policy": "sparse"}'


class HoldingCost(StepCost):
    """Has it that prompts and decodes must not share a step."""

    def seconds(self, step: StepShape) -> float:
        """A second if they do."""
        return 1.0 if 0 < step.prefill_tokens < step.rows else 1e-3

    def knows(self, step: StepShape) -> bool:
        """From the start."""
        return True


class HoldingScheduler(SparseScheduler):
    """`SparseScheduler`, deceived."""

    def shutdown(self) -> None:
        """Say how often it held back, and whether it fell back."""
        print(f"held back {self.decisions['hold_back']} times, faults {dict(self.fallbacks)}", flush=True)
        super().shutdown()

    def _new_cost(self) -> StepCost:
        return HoldingCost(LayerTable([], []), scale=1.0, max_sparse_rows=0)
