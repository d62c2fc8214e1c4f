"""The layout of a layer's counters, and what is derived from them.

One int64 tensor [2, 4] per layer, ``counters[path, kind]``; the kernel adds to it, nothing else does. All counts are
cumulative; a call with no rows counts nothing. With dReLU it is [3, 4]: the last row counts each view of the activity by itself.
"""

import torch

SPARSE, DENSE = 0, 1
"""First index: the path a call took."""

ROWS, ACTIVE, UNION, STEPS = 0, 1, 2, 3
"""Second index: rows; active neurons, summed over rows; union neurons, summed over steps; steps (calls)."""

VIEWS = 2
"""First index, dReLU: what the dense path saw, [ROWS], [FIRST] and [SECOND]."""

FIRST, SECOND = 1, 2
"""Second index there: (row, neuron) pairs whose gate value, and whose up value, is above the threshold."""


def shape(drelu: bool = False) -> tuple[int, int]:
    """Of a layer's counters."""
    return (3 if drelu else 2, 4)


def new_counters(device: torch.device | str = "cpu", *, drelu: bool = False) -> torch.Tensor:
    """Counters of one layer, all zero: int64 [2, 4], with dReLU [3, 4]."""
    return torch.zeros(shape(drelu), dtype=torch.int64, device=device)


def density(counts: torch.Tensor, d_ff: int) -> float | None:
    """Share of active neurons over all rows of both paths; None before the first row.

    ``counts`` [2, 4] are counters or the difference of two readings of them.
    """
    rows = int(counts[:, ROWS].sum())
    return int(counts[:, ACTIVE].sum()) / (rows * d_ff) if rows else None


def union_density(counts: torch.Tensor, d_ff: int) -> float | None:
    """Share of neurons active for at least one row of a step, mean over the steps of both paths; None before the first step."""
    steps = int(counts[:, STEPS].sum())
    return int(counts[:, UNION].sum()) / (steps * d_ff) if steps else None
