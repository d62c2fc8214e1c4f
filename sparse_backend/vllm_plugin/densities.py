"""How dense requests are: measured row by row while they run, guessed from those before them until then."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

_DECODE_WEIGHT = 1 / 16  # of the newest decode step in a request's running density
_GLOBAL_WEIGHT = 1 / 64  # of the newest finished request in the mean over all
_REMEMBERED = 4096  # prefixes and sessions, each


@dataclass(slots=True)
class _Seen:
    """A running request, of which there have been rows."""

    density: float
    """As of late."""
    total: float
    """Of all rows."""
    rows: int


class Densities:
    """Running densities of running requests, means of finished ones. Densities are shares of active neurons, mean over layers."""

    def __init__(self, expected: float) -> None:
        """``expected``: of a request before any has finished."""
        self._mean = expected
        self._running: dict[str, _Seen] = {}
        self._known: OrderedDict[Hashable, float] = OrderedDict()

    def observe(self, request: str, densities: Sequence[float]) -> None:
        """Take in the densities of a request's rows in one step."""
        rows = len(densities)
        if not rows:
            return
        total = sum(densities)
        seen = self._running.get(request)
        if seen is None:
            self._running[request] = _Seen(total / rows, total, rows)
            return
        seen.density += (1.0 if rows > 1 else _DECODE_WEIGHT) * (total / rows - seen.density)
        seen.total += total
        seen.rows += rows

    def running(self, request: str) -> float | None:
        """Of a request that has been seen; None before."""
        seen = self._running.get(request)
        return None if seen is None else seen.density

    def predict(self, keys: Iterable[Hashable]) -> float:
        """Of a request yet to be seen: the mean of the first of its keys that is known, most telling first; else of all."""
        return next((self._known[key] for key in keys if key in self._known), self._mean)

    def finish(self, request: str, keys: Iterable[Hashable]) -> tuple[float, int] | None:
        """Forget a request and learn from it; returns its mean over all rows and their number, None if it was never seen."""
        seen = self._running.pop(request, None)
        if seen is None:
            return None
        density = seen.total / seen.rows
        self._mean += _GLOBAL_WEIGHT * (density - self._mean)
        for key in keys:
            before = self._known.pop(key, density)
            self._known[key] = (before + density) / 2
            if len(self._known) > 2 * _REMEMBERED:
                self._known.popitem(last=False)
        return density, seen.rows
