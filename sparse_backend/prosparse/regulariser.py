"""Step 2's regulariser: the L1 norm of what enters down_proj."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_backend.prosparse.gated_ffn import gated_ffns

# ProSparse (arXiv 2402.13516, eq. 2) leaves the reduction open; with this one λ is independent of batch and context.
L1_REDUCTION = "mean over tokens of the sum over d_ff, summed over layers"


class ActivationL1:
    """Collects the L1 norm of x1 = act(gate)*up in every gated feed-forward layer during a forward pass.

    It reads x1 as the input of down_proj, through a forward pre-hook, so it works on any gated feed-forward layer.
    """

    def __init__(self, model: nn.Module) -> None:
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
            norm = torch.linalg.vector_norm(x1, ord=1, dtype=torch.float32) / (x1.numel() // x1.shape[-1])
            if self._collecting:
                self._norms.append(norm)
        if self.counting and self._collecting:
            self._zero_shares.append((x1.detach() == 0).mean(dtype=torch.float32))

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
        """The collected norm, to be weighted by λ: a float32 scalar, reduced as ``L1_REDUCTION`` says."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).sum()

    def take_sparsity(self) -> float:
        """Share of exact zeros in x1, mean over layers and the counted forward passes since the last call."""
        shares, self._zero_shares = self._zero_shares, []
        return torch.stack(shares).mean().item()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
