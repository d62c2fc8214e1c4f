"""The op ``prosparse::sparse_gated_ffn`` for torch: its schema, its shapes under torch.compile, and what runs without kernels."""

import math

import torch
from torch.nn import functional as F

from sparse_backend.ffn import native, reference
from sparse_backend.ffn.counters import shape

_ALIGNMENT = 16

# Kept alive: dropping the library would take the ops away.
_library = torch.library.Library("prosparse", "DEF")
_library.define(
    "sparse_gated_ffn(Tensor x, Tensor gate_up, Tensor down_t, float threshold, Tensor(a!) counters, int max_sparse_rows,"
    " Tensor? is_padding=None, bool drelu=False, Tensor(b!)? row_active=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "gated_activation(Tensor gate_up_out, float threshold, Tensor(a!) counters, Tensor? is_padding=None, bool drelu=False,"
    " Tensor(b!)? row_active=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "sparse_gate(Tensor x, Tensor gate_up) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
)


def sparse_gated_ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    max_sparse_rows: int,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gated feed-forward layer: y = (gate * active * up) @ down_t, gate and up = x @ gate_up^T.

    A neuron is active where float32(gate) > float32(threshold) or gate is NaN. Up to ``max_sparse_rows`` rows take the
    sparse path, which reads the up and down rows of active neurons only and keeps gate and up values in float32; more rows
    take dense products, with gate and up rounded to the dtype of x. Both give the same result up to that rounding, and the
    same bits for the same input and number of threads. Weights must be finite: the sparse path does not look at those of
    neurons that no row activates.

    With ``drelu`` (Turbo Sparse, arXiv 2406.05955: relu(gate) * relu(up)) a neuron's up value must be above the threshold, too.
    Then gate and up rows may change places, which changes no result. The sparse path reads all gate rows, the up rows of neurons
    whose gate is above the threshold for some row, and the down rows of active neurons: the sparser of the two belongs in the
    gate's place. The counters of the dense path tell which one that is. An inactive neuron adds nothing, whatever its values.

    On a GPU the dense path is also taken in float32 and above the row count the kernels take (``native.max_rows``). There
    gate weights are read while the kernel ahead on the stream runs out: after changing them, synchronise once.

    Args:
        x: [rows, d_model], bfloat16 or float32, on a GPU also float16; any number of rows, also none.
        gate_up: [2 * d_ff, d_model], the dtype of x: gate rows, then up rows, one per neuron.
        down_t: [d_ff, d_model], the dtype of x: the transposed down projection.
        threshold: 0 or more; 0 is ReLU, more is FATReLU.
        counters: int64 [2, 4], with drelu [3, 4], see ``sparse_backend.ffn.counters``; this call is added to it.
        max_sparse_rows: 0 always takes the dense path. It is compared with all rows, those of padding included.
        is_padding: bool [rows]; rows where it is True are neither computed nor counted, and their y is 0. None: no padding.
        drelu: whether up values must be above the threshold, too.
        row_active: int32, at least [rows]; the active neurons of row i are added to element i, modulo 2^32. None: not counted.

    d_model and d_ff are multiples of 8; all tensors are on one device and contiguous; x and the weights start at a multiple of
    16 bytes.

    Raises:
        RuntimeError: a tensor has another dtype, shape, layout or device; the message names it.
    """
    return torch.ops.prosparse.sparse_gated_ffn(
        x, gate_up, down_t, threshold, counters, max_sparse_rows, is_padding, drelu, row_active
    )


def gated_activation(
    gate_up_out: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """The middle of the dense path by itself, for layers whose products are not ours: h = gate * active * up [rows, d_ff].

    Args:
        gate_up_out: [rows, 2 * d_ff], gate values, then up values; contiguous, bfloat16 or float32, on a GPU also float16.
        threshold: as for ``sparse_gated_ffn``, and so are counters and drelu.
        counters: this call is added to their dense path.
        is_padding: bool [rows]; the h of rows where it is True is 0, and they are not counted.
        drelu: whether up values must be above the threshold, too.
        row_active: as for ``sparse_gated_ffn``.

    Raises:
        RuntimeError: a tensor has another dtype, shape, layout or device; the message names it.
    """
    return torch.ops.prosparse.gated_activation(gate_up_out, threshold, counters, is_padding, drelu, row_active)


def gate_values(x: torch.Tensor, gate_up: torch.Tensor, max_sparse_rows: int) -> torch.Tensor:
    """The very gate values [rows, d_ff] that ``sparse_gated_ffn`` compares with the threshold, by the same code.

    float32 on the sparse path; the dtype of x on the dense path, which rounds them.
    """
    if _takes_sparse_path(x, max_sparse_rows):
        return torch.ops.prosparse.sparse_gate(x, gate_up)
    return F.linear(x, gate_up)[:, : gate_up.shape[0] // 2]


def up_values(x: torch.Tensor, gate_up: torch.Tensor, max_sparse_rows: int) -> torch.Tensor:
    """The same for the up values, which count with dReLU; copies the weights."""
    if _takes_sparse_path(x, max_sparse_rows):
        # A neuron's value depends neither on what else is computed nor on which half it is in.
        return torch.ops.prosparse.sparse_gate(x, torch.cat(gate_up.chunk(2)[::-1]))
    return F.linear(x, gate_up)[:, gate_up.shape[0] // 2 :]


def _takes_sparse_path(x: torch.Tensor, max_sparse_rows: int) -> bool:
    limit = min(max_sparse_rows, native.max_rows(x.dtype, x.shape[1])) if x.is_cuda else max_sparse_rows
    return native.load(x.device.type) and x.shape[0] <= limit


@torch.library.register_fake("prosparse::sparse_gated_ffn", lib=_library)
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("prosparse::gated_activation", lib=_library)
def _(gate_up_out: torch.Tensor, *_: object) -> torch.Tensor:
    return gate_up_out.new_empty((gate_up_out.shape[0], gate_up_out.shape[1] // 2))


@torch.library.register_fake("prosparse::sparse_gate", lib=_library)
def _(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], gate_up.shape[0] // 2), dtype=torch.float32)


def _without_kernels(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    max_sparse_rows: int,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """What runs where the device's kernels are not loaded: loads them if it can, else computes densely in any case."""
    if native.load(x.device.type):
        return sparse_gated_ffn(x, gate_up, down_t, threshold, counters, max_sparse_rows, is_padding, drelu, row_active)
    check_arguments(x, gate_up, down_t, threshold, counters, is_padding, drelu, row_active)
    native.warn_of_reference(x.device.type)
    return reference.dense_gated_ffn(x, gate_up, down_t, threshold, counters, is_padding, drelu, row_active)


def _activation_without_kernels(
    gate_up_out: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    if native.load(gate_up_out.device.type):
        return gated_activation(gate_up_out, threshold, counters, is_padding, drelu, row_active)
    native.warn_of_reference(gate_up_out.device.type)
    return reference.gated_activation(gate_up_out, threshold, counters, is_padding, drelu, row_active)


def check_arguments(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> None:
    """Refuse what csrc/arguments.h refuses, in the same words, so that the reference takes nothing the kernels would not."""

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(message)

    def check_device(tensor: torch.Tensor, name: str) -> None:
        check(tensor.device == x.device, f"{name} must be on the device of x")

    def check_matrix(tensor: torch.Tensor, name: str) -> None:
        check(tensor.dim() == 2, f"{name} must be a matrix, but it has {tensor.dim()} dimensions")
        check(tensor.dtype == x.dtype, f"{name} must have the dtype of x")
        check_device(tensor, name)
        check(tensor.is_contiguous(), f"{name} must be contiguous; pass a contiguous copy")
        aligned = tensor.data_ptr() % _ALIGNMENT == 0
        check(aligned, f"{name} must start at a multiple of {_ALIGNMENT} bytes; pass a copy instead of a view")

    if x.is_cuda:
        supported = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        check(supported, "x must be bfloat16, float16 or float32")
    else:
        check(x.dtype in (torch.bfloat16, torch.float32), "x must be bfloat16 or float32")
    check_matrix(x, "x")
    check_matrix(gate_up, "gate_up")
    (gate_up_rows, width), d_model, d_ff = gate_up.shape, x.shape[1], gate_up.shape[0] // 2
    check(
        gate_up_rows % 2 == 0 and width == d_model,
        f"gate_up must be [2 * d_ff, d_model] = [2 * d_ff, {d_model}], but it is [{gate_up_rows}, {width}]",
    )
    for name, size in (("d_model", d_model), ("d_ff", d_ff)):
        check(size > 0 and size % 8 == 0, f"{name} must be a positive multiple of 8, but it is {size}")
    check_matrix(down_t, "down_t")
    expected = [d_ff, d_model]
    check(
        list(down_t.shape) == expected,
        f"down_t must be [d_ff, d_model] = {expected}, but it is {list(down_t.shape)}",
    )
    check(
        math.isfinite(threshold) and threshold >= 0, f"threshold must be finite and not negative, but it is {threshold}"
    )
    check(
        counters.dtype == torch.int64 and counters.is_contiguous() and tuple(counters.shape) == shape(drelu),
        f"counters must be a contiguous int64 tensor of shape {list(shape(drelu))}",
    )
    check_device(counters, "counters")
    if is_padding is not None:
        rows = x.shape[0]
        check(
            is_padding.dtype == torch.bool and is_padding.is_contiguous() and tuple(is_padding.shape) == (rows,),
            f"is_padding must be a contiguous bool tensor of shape [rows] = [{rows}]",
        )
        check_device(is_padding, "is_padding")
    if row_active is not None:
        rows = x.shape[0]
        check(
            row_active.dtype == torch.int32
            and row_active.is_contiguous()
            and row_active.dim() == 1
            and row_active.shape[0] >= rows,
            f"row_active must be a contiguous int32 tensor of at least [rows] = [{rows}]",
        )
        check_device(row_active, "row_active")


# For every device. The kernels that a native library registers for its own device go before it.
_library.impl("sparse_gated_ffn", _without_kernels, "CompositeExplicitAutograd")
_library.impl("gated_activation", _activation_without_kernels, "CompositeExplicitAutograd")
