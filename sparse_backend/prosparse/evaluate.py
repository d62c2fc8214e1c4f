"""What a model does on held-out text: its loss, how sparse each layer is, and how often each neuron is active."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_backend.prosparse.gated_ffn import gated_ffns, watching
from sparse_backend.prosparse.tokens import HeldOutBlocks


@dataclass(frozen=True)
class Measurement:
    """Means over every token of the held-out blocks."""

    loss: float
    """Next-token cross-entropy in nats, over context - 1 predictions a block."""
    sparsity: Tensor
    """Share of exact zeros in x1 = act(gate)*up, by layer: float64 [n_layers]."""
    neuron_frequency: Tensor
    """Share of tokens for which the neuron's x1 is not zero: float64 [n_layers, d_ff]."""
    gate_scales: Tensor
    """Root mean square of the gate's values over tokens and neurons, by layer: float64 [n_layers]."""
    tokens: int
    """Tokens of all blocks."""

    @property
    def gate_scale(self) -> float:
        """Root mean square of the gate's values over tokens, neurons and layers."""
        return self.gate_scales.square().mean().sqrt().item()

    @property
    def mean_sparsity(self) -> float:
        """Mean over layers."""
        return self.sparsity.mean().item()


# Logits of one evaluation batch: in float32 the largest tensor, 0.5 GB. Smaller batches leave a GPU waiting for launches.
_BATCH_LOGITS = 2**27


@torch.inference_mode()
def measure(model: PreTrainedModel, blocks: HeldOutBlocks, batch_tokens: int | None = None) -> Measurement:
    """Run ``model``, in its own dtype and on its own device, over the held-out blocks.

    Args:
        model: a causal model with gated feed-forward layers.
        blocks: the text.
        batch_tokens: tokens of one forward pass; by default as many as keep the logits below 0.5 GB.
    """
    batch_tokens = batch_tokens or _BATCH_LOGITS // model.config.vocab_size
    ffns = gated_ffns(model)
    device = next(model.parameters()).device
    d_ff = ffns[0].down_proj.in_features
    nonzero = torch.zeros(len(ffns), d_ff, dtype=torch.int64, device=device)
    gate_squares = torch.zeros(len(ffns), dtype=torch.float64, device=device)

    def count(layer: int, x1: Tensor) -> None:
        nonzero[layer] += (x1 != 0).flatten(0, -2).sum(0)

    def square(layer: int, gate: Tensor) -> None:
        gate_squares[layer] += torch.linalg.vector_norm(gate, dtype=torch.float32).double() ** 2

    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    context = blocks.blocks.shape[1]
    with watching(model, "down_proj", count), watching(model, "act_fn", square):
        for batch in blocks.batches(max(1, batch_tokens // context)):
            tokens = batch.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            loss_sum += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
            )
    model.train(was_training)
    tokens_seen = blocks.blocks.numel()
    frequency = (nonzero.double() / tokens_seen).cpu()
    return Measurement(
        loss=loss_sum.item() / (len(blocks) * (context - 1)),
        sparsity=1 - frequency.mean(1),
        neuron_frequency=frequency,
        gate_scales=(gate_squares / (tokens_seen * d_ff)).sqrt().cpu(),
        tokens=tokens_seen,
    )


def combined(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of all blocks that ``parts`` measured separately: their means, weighted by their tokens."""
    weights = torch.tensor([part.tokens for part in parts], dtype=torch.float64)
    weights /= weights.sum()

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.einsum("p,p...->...", weights, torch.stack(list(values)))

    return Measurement(
        loss=mean([torch.tensor(part.loss, dtype=torch.float64) for part in parts]).item(),
        sparsity=mean([part.sparsity for part in parts]),
        neuron_frequency=mean([part.neuron_frequency for part in parts]),
        gate_scales=mean([part.gate_scales.square() for part in parts]).sqrt(),
        tokens=sum(part.tokens for part in parts),
    )
