"""The op as a model on a GPU calls it: rows that only pad a step to the size of its CUDA graph are left out.

vLLM marks them in a bool tensor of its forward context. The tensor's memory stays the same from step to step, so that a captured
graph sees the marks of the step it is replayed for. The context can be read neither in compiled code, which would keep the tensor
of one step, nor by the kernel: hence an op around the op.
"""

import logging

import torch
from vllm import envs
from vllm.forward_context import get_forward_context, is_forward_context_available

from sparse_backend.ffn import gated_activation, sparse_gated_ffn

logger = logging.getLogger(__name__)

# Kept alive: dropping the library would take the op away.
_library = torch.library.Library("prosparse", "FRAGMENT")
_library.define(
    "sparse_gated_ffn_of_real_rows(Tensor x, Tensor gate_up, Tensor down_t, float threshold, Tensor(a!) counters,"
    " int max_sparse_rows, bool drelu=False, Tensor(b!)? row_active=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "gated_activation_of_real_rows(Tensor gate_up_out, float threshold, Tensor(a!) counters, bool drelu=False,"
    " Tensor(b!)? row_active=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def sparse_gated_ffn_of_real_rows(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    max_sparse_rows: int,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sparse_gated_ffn``, but rows that are padding of the current step are neither computed nor counted: their y is 0.

    Arguments, result and errors are those of ``sparse_backend.ffn.sparse_gated_ffn``.
    """
    return torch.ops.prosparse.sparse_gated_ffn_of_real_rows(
        x, gate_up, down_t, threshold, counters, max_sparse_rows, drelu, row_active
    )


def gated_activation_of_real_rows(
    gate_up_out: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    """``gated_activation``, likewise."""
    return torch.ops.prosparse.gated_activation_of_real_rows(gate_up_out, threshold, counters, drelu, row_active)


def mask_is_refreshed() -> bool:
    """Does vLLM mark the padding of every step? If not, the marks are those of the warm-up, whose rows are all padding."""
    return bool(envs.VLLM_MOE_SKIP_PADDING)


def check_mask() -> None:
    """Say, once at start-up, if padding is computed and counted because vLLM does not tell it from tokens."""
    if not mask_is_refreshed():
        logger.warning(
            "VLLM_MOE_SKIP_PADDING=0 keeps vLLM from marking rows that only pad a step to the size of its CUDA graph: they are"
            " computed and counted like tokens, so the sparsity metrics count more rows than there were. Unset it."
        )


def _current_mask() -> torch.Tensor | None:
    """bool [rows] of the step at hand, True for padding; None where vLLM does not say."""
    if not mask_is_refreshed() or not is_forward_context_available():
        return None
    return get_forward_context().is_padding


def _of_real_rows(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down_t: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    max_sparse_rows: int,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    return sparse_gated_ffn(
        x, gate_up, down_t, threshold, counters, max_sparse_rows, _current_mask(), drelu, row_active
    )


def _activation_of_real_rows(
    gate_up_out: torch.Tensor,
    threshold: float,
    counters: torch.Tensor,
    drelu: bool = False,
    row_active: torch.Tensor | None = None,
) -> torch.Tensor:
    return gated_activation(gate_up_out, threshold, counters, _current_mask(), drelu, row_active)


_library.impl("sparse_gated_ffn_of_real_rows", _of_real_rows, "CompositeExplicitAutograd")
_library.impl("gated_activation_of_real_rows", _activation_of_real_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("prosparse::sparse_gated_ffn_of_real_rows", lib=_library)
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("prosparse::gated_activation_of_real_rows", lib=_library)
def _(gate_up_out: torch.Tensor, *_: object) -> torch.Tensor:
    return gate_up_out.new_empty((gate_up_out.shape[0], gate_up_out.shape[1] // 2))
