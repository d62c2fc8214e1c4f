"""Which of several replicas a request goes to, as the client of a benchmark decides it."""

from collections.abc import Mapping, Sequence

from sparse_backend.vllm_plugin.cost import StepCost, StepShape, union_of


class Even:
    """As vLLM's own load balancer: the replica with the fewest requests, in turn where they are equal."""

    def __init__(self, replicas: int) -> None:
        self._counts = [0] * replicas
        self._first = 0

    def begin(self, traffic_class: str) -> int:
        """The next one."""
        count = len(self._counts)
        turns = [(self._first + offset) % count for offset in range(count)]
        index = min(turns, key=lambda turn: self._counts[turn])
        self._first = (self._first + 1) % count
        self._counts[index] += 1
        return index

    def end(self, index: int, traffic_class: str) -> None:
        """One less."""
        self._counts[index] -= 1


class ByDensity:
    """By the predicted loss of time; the density of a class is taken as known."""

    def __init__(self, replicas: int, cost: StepCost, densities: Mapping[str, float]) -> None:
        self._rows: list[list[float]] = [[] for _ in range(replicas)]
        self._cost, self._densities = cost, densities

    def begin(self, traffic_class: str) -> int:
        """The one that loses least."""
        density = self._densities[traffic_class]
        index = place(self._cost, self._rows, density)
        self._rows[index].append(density)
        return index

    def end(self, index: int, traffic_class: str) -> None:
        """One row less."""
        self._rows[index].remove(self._densities[traffic_class])


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
