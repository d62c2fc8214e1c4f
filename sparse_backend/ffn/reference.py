"""The gated FFN in plain PyTorch: what the kernels are tested against, and what runs where they could not be built.

A neuron is active unless gate <= threshold, compared in float32: it is strictly above, or NaN, so that a NaN shows in the output
(torch.nn.functional.threshold, and with it vLLM's FatreluAndMul, lets a NaN through as well). With dReLU (Turbo Sparse, arXiv
2406.05955) the same must hold of its up value, and an inactive neuron adds nothing whatever its other value is.
"""

import torch
from torch.nn import functional as F

from sparse_backend.ffn.counters import ACTIVE, DENSE, FIRST, ROWS, SECOND, SPARSE, STEPS, UNION, VIEWS


def active_neurons(gate: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which gate values [rows, d_ff] are active, bool; the comparison is in float32 whatever the dtype of ``gate``."""
    # A Python number is compared in the tensor's dtype: float32. A tensor made of it here would be copied to the device anew at
    # each call, which a CUDA graph cannot capture.
    return ~(gate.float() <= threshold)


def count(
    counters: torch.Tensor,
    path: int,
    active: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    row_active: torch.Tensor | None = None,
) -> None:
    """Add one call with the active neurons ``active`` [rows, d_ff] to ``counters`` [2, 4] and, per row, to ``row_active``.

    Rows of padding are left out.
    """
    if active.shape[0] == 0:
        return
    rows, steps = active.shape[0], 1
    if is_padding is not None:
        real = ~is_padding
        active = active & real[:, None]
        rows, steps = real.sum(), real.any()
    counters[path, ROWS] += rows
    counters[path, ACTIVE] += active.sum()
    counters[path, UNION] += active.any(dim=0).sum()
    counters[path, STEPS] += steps
    if row_active is not None:
        row_active[: active.shape[0]] += active.sum(dim=1, dtype=torch.int32)


def count_views(counters: torch.Tensor, views: list[torch.Tensor], is_padding: torch.Tensor | None = None) -> None:
    """Add what the dense path of a dReLU layer saw, gates and up values above the threshold [rows, d_ff], to its counters."""
    real = torch.ones_like(views[0][:, 0]) if is_padding is None else ~is_padding
    counters[VIEWS, ROWS] += real.sum()
    for kind, view in zip((FIRST, SECOND), views, strict=True):
        counters[VIEWS, kind] += (view & real[:, None]).sum()


def without_padding(x: torch.Tensor, is_padding: torch.Tensor | None) -> torch.Tensor:
    """x with zero rows for those of padding: they activate no neuron, so that their y is 0."""
    return x if is_padding is None else x.masked_fill(is_padding[:, None], 0)


def sparse_gated_ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (gate * active * up) @ down_t in float32 throughout, rounded once to the dtype of x: the definition.

    Args:
        x: [rows, d_model].
        gate_up: [2 * d_ff, d_model], the gate rows and then the up rows.
        down_t: [d_ff, d_model].
        threshold: a neuron is active above it.
        counters: int64 [2, 4], counted as the sparse path.
        is_padding: bool [rows], the rows that are not counted and whose y is 0; None for none.
        drelu: the up value must be above the threshold, too.
        row_active: int32, at least [rows], to which each row's active neurons are added; None for not counting them.
    """
    d_ff = down_t.shape[0]
    x = without_padding(x, is_padding)
    gate, up = (x.float() @ gate_up.float().t()).split(d_ff, dim=1)
    active = active_neurons(gate, threshold)
    if drelu:
        active = active & active_neurons(up, threshold)
    count(counters, SPARSE, active, is_padding, row_active)
    return (_products(gate, up, active, drelu) @ down_t.float()).to(x.dtype)


def dense_gated_ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in the dtype of x, operation by operation as vLLM's dense FATReLU MLP does it; counted as the dense path."""
    return gated_activation(F.linear(x, gate_up), threshold, counters, is_padding, drelu, row_active) @ down_t


def gated_activation(
    gate_up_out: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """h = gate * active * up [rows, d_ff] from gate and up values [rows, 2 * d_ff], in their dtype; counted as the dense path."""
    gate, up = without_padding(gate_up_out, is_padding).chunk(2, dim=1)
    views = [active_neurons(gate, threshold)]
    if drelu:
        views.append(active_neurons(up, threshold))
        count_views(counters, views, is_padding)
    active = views[0] & views[-1]
    count(counters, DENSE, active, is_padding, row_active)
    return _products(gate, up, active, drelu)


def _products(gate: torch.Tensor, up: torch.Tensor, active: torch.Tensor, drelu: bool) -> torch.Tensor:
    return torch.where(active, gate * up, 0) if drelu else torch.where(active, gate, 0) * up
