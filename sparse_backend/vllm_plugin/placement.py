"""Which replica a request goes to: the one whose rows, the new one among them, are predicted to lose the least time."""

from collections.abc import Sequence

from sparse_backend.vllm_plugin.cost import StepCost, StepShape, union_of


def place(cost: StepCost, replicas: Sequence[Sequence[float]], density: float) -> int:
    """Index of the replica.

    A step is as long for each of its rows: a replica's loss is the growth of its number of rows times its step's time. So
    sparse rows keep away from dense ones, whose union is large already, and dense ones from sparse ones, which they would slow
    down most.

    Args:
        cost: of a step, the same for all replicas.
        replicas: of each, the densities of the rows it decodes.
        density: of the request, predicted.
    """
    losses = [_weighted(cost, [*rows, density]) - _weighted(cost, rows) for rows in replicas]
    return losses.index(min(losses))


def _weighted(cost: StepCost, densities: Sequence[float]) -> float:
    rows = len(densities)
    return rows * cost.seconds(StepShape(rows, union=union_of(densities))) if rows else 0.0
