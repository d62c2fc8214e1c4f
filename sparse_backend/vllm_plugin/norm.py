"""The norms of a decoder layer whose feed-forward layer may take the sparse path on a GPU."""

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from sparse_backend.ffn.norm import add_rms_norm, is_early


class EarlyRMSNorm(RMSNorm):
    """vLLM's RMSNorm, but with a residual it is our kernel, which lets the kernel behind it start early.

    A module of vLLM's own kind, so that weights load as ever. Not a custom op of vLLM's: those may be switched off.
    """

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Norm of x [rows, d_model], or of x + residual, which is then returned beside it."""
        if residual is None:
            return super().forward(x)
        return add_rms_norm(x, residual, self.weight, self.variance_epsilon)


def pays(dtype: torch.dtype, d_model: int, max_sparse_rows: int) -> bool:
    """Whether a decoder layer should have such norms: its feed-forward layer can take the sparse path and start early."""
    return max_sparse_rows > 0 and is_early(dtype, d_model, current_platform.device_type)
