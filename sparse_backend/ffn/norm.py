"""The op ``prosparse::add_rms_norm``: the norm in front of a feed-forward layer, which lets the layer's kernel start early.

On a GPU the gate kernel can read weights while the kernel ahead of it on the stream runs out, if that one allows it. Norms that
torch.compile or vLLM bring do not. In plain PyTorch, which runs everywhere else, there is nothing to gain: see ``is_early``.
"""

import torch

from sparse_backend.ffn import native

# Kept alive: dropping the library would take the op away.
_library = torch.library.Library("prosparse", "FRAGMENT")
_library.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)

# kMaxNormWidth in csrc/cuda/kernels.h.
_MAX_WIDTH = 32768


def is_early(dtype: torch.dtype, d_model: int, device_type: str) -> bool:
    """Is there a kernel for it that lets its successor start early?"""
    supported = dtype in (torch.bfloat16, torch.float16) and d_model % 8 == 0 and d_model <= _MAX_WIDTH
    return device_type == "cuda" and supported and native.load("cuda")


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm (arXiv 1910.07467) of x + residual.

    sum = x + residual, y = sum / sqrt(mean(sum²) + epsilon) * weight, in float32; rounded where vLLM's ``fused_add_rms_norm``
    rounds: the sum as it is returned, the normalised row before it is multiplied with the weight, and after.

    Args:
        x: [rows, d_model], bfloat16, float16 or, not on a GPU, float32; any number of rows.
        residual: [rows, d_model], the dtype of x.
        weight: [d_model], the dtype of x.
        epsilon: added to the mean square.

    Returns:
        y and sum, [rows, d_model], the dtype of x.

    Raises:
        RuntimeError: on a GPU, a tensor has another dtype, shape, layout or device; the message names it.
    """
    y, total = torch.ops.prosparse.add_rms_norm(x, residual, weight, epsilon)
    return y, total


def _reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.float() + residual.float()
    normal = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + epsilon)
    return normal.to(x.dtype) * weight, total.to(x.dtype)


# For every device. The kernel that the native CUDA library registers goes before it.
_library.impl("add_rms_norm", _reference, "CompositeExplicitAutograd")


@torch.library.register_fake("prosparse::add_rms_norm", lib=_library)
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
