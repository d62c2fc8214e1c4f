"""Step 2's regulariser: the L1 norm of what enters down_proj."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_backend.prosparse.gated_ffn import gated_ffns

# ProSparse (arXiv 2402.13516, eq. 2) sums over layers and leaves the reduction within one open. With the first of these,
# λ is independent of batch and context; with "sum" it depends on the number of tokens in one forward pass.
Reduction = Literal["mean_tokens_sum_dff", "sum", "mean"]


class ActivationL1:
    """Collects the L1 norm of x1 = act(gate)*up in every gated feed-forward layer during a forward pass.

    It reads x1 as the input of down_proj, through a forward pre-hook, so it works on any gated feed-forward layer.
    """

    def __init__(self, model: nn.Module, reduction: Reduction = "mean_tokens_sum_dff", scale: float = 1.0) -> None:
        self._reduction, self._scale = reduction, scale
        self.counting = False
        """Also count the zeros of x1."""
        # The hooks read this flag and not λ, whose every value would compile a compiled model anew.
        self._penalising = False
        self._collecting = False
        self._norms: list[Tensor] = []
        self._zero_shares: list[Tensor] = []
        self._handles = [ffn.down_proj.register_forward_pre_hook(self._observe) for ffn in gated_ffns(model)]

    def _observe(self, _down_proj: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x1 = inputs[0]
        if self._penalising and torch.is_grad_enabled():
            # Gradient checkpointing runs this again in the backward pass: it must compute the same, but not collect it.
            norm = torch.linalg.vector_norm(x1, ord=1, dtype=torch.float32) * self._factor(x1)
            if self._collecting:
                self._norms.append(norm)
        if self.counting and self._collecting:
            self._zero_shares.append((x1.detach() == 0).mean(dtype=torch.float32))

    def _factor(self, x1: Tensor) -> float:
        if self._reduction == "sum":
            return self._scale
        return self._scale / (x1.numel() if self._reduction == "mean" else x1.numel() // x1.shape[-1])

    @contextmanager
    def collecting(self, penalise: bool) -> Iterator[None]:
        """Collect from the forward pass that runs in the block: zeros if ``counting``, norms if ``penalise``."""
        self._penalising = penalise
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    def take_norm(self) -> Tensor:
        """The collected norm, to be weighted by λ: reduced within each layer, scaled, summed over layers; float32 scalar."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).sum()

    def take_sparsity(self) -> Tensor:
        """Share of exact zeros in x1, mean over layers and the counted forward passes since the last call: a scalar."""
        shares, self._zero_shares = self._zero_shares, []
        return torch.stack(shares).mean()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
