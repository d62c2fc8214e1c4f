"""Step 3: the activation threshold, chosen by a sweep on held-out text under a loss budget.

One threshold for all layers, or one per layer where that wins. A checkpoint's config and the kernels know one threshold only,
so a threshold of a layer's own is folded into its weights: with a power of two s, relu(g) cut at t equals relu(s*g) cut at
s*t, and what s adds to the gate it takes from up. Powers of two change no bit of the result.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_backend.activation import Activation
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.gated_ffn import gated_ffns
from sparse_backend.prosparse.modeling import FatReLU
from sparse_backend.prosparse.recipe import ThresholdRecipe
from sparse_backend.prosparse.tokens import HeldOutBlocks

# Layers' own thresholds are only taken if they win by this share of all activations: less is within a sweep's grid.
_MARGIN = 0.002


@dataclass(frozen=True)
class SweepPoint:
    """What one threshold gives on held-out text."""

    threshold: float
    loss: float
    sparsity: float
    factors: tuple[float, ...] = ()
    """Powers of two by which each layer's threshold differs from ``threshold``; empty if none does."""

    def rounded(self) -> dict[str, object]:
        """The point as the manifest records it."""
        point = {"threshold": self.threshold, "loss": round(self.loss, 4), "sparsity": round(self.sparsity, 4)}
        return point | ({"factors": list(self.factors)} if self.factors else {})


def choose(points: Sequence[SweepPoint], budget: float, target: float | None = None) -> SweepPoint:
    """The sparsest point whose loss is at most ``budget`` nats above that of the first, threshold 0.

    With a ``target``, of the points that are at least as sparse the one with the lowest loss, if any is affordable.
    """
    affordable = [point for point in points if point.loss <= points[0].loss + budget]
    one_for_all = _best([point for point in affordable if not point.factors], target)
    best = _best(affordable, target)
    return best if best.sparsity > one_for_all.sparsity + _MARGIN else one_for_all


def _best(points: Sequence[SweepPoint], target: float | None) -> SweepPoint:
    reached = [point for point in points if target is not None and point.sparsity >= target]
    if reached:
        return min(reached, key=lambda point: point.loss)
    return max(points, key=lambda point: point.sparsity)


def sweep(model: PreTrainedModel, blocks: HeldOutBlocks, recipe: ThresholdRecipe) -> list[SweepPoint]:
    """Measure a ReLU model under each threshold of the recipe, in rising order; 0 comes first.

    Thresholds are rounded to three significant digits, so that what is measured is what config.json says.
    """
    plain = measure(model, blocks)
    unit = plain.gate_scale if recipe.unit == "gate_rms" else 1.0
    thresholds = sorted({float(f"{factor * unit:.3g}") for factor in recipe.sweep} - {0.0})
    points = [SweepPoint(0.0, plain.loss, plain.mean_sparsity)]
    layers_own = tuple(
        2.0 ** round(math.log2(scale / plain.gate_scale)) if scale > 0 else 1.0 for scale in plain.gate_scales.tolist()
    )
    variants: list[tuple[float, ...]] = [()]
    if recipe.per_layer and len(set(layers_own)) > 1:
        variants.append(layers_own)
    for factors in variants:
        for threshold in thresholds:
            with applied(model, threshold, factors):
                measured = measure(model, blocks)
            points.append(SweepPoint(threshold, measured.loss, measured.mean_sparsity, factors))
    return points


def activation_of(threshold: float) -> Activation:
    """ReLU for 0, else FATReLU."""
    return Activation(kind="fatrelu", threshold=threshold) if threshold > 0 else Activation(kind="relu")


@torch.no_grad()
def fold(model: nn.Module, factors: Sequence[float]) -> None:
    """Change the weights such that one threshold for all layers does what ``factors`` times it did in each."""
    for ffn, factor in zip(gated_ffns(model), factors, strict=True):
        for part, scale in ((ffn.gate_proj, 1 / factor), (ffn.up_proj, factor)):
            for parameter in part.parameters():
                parameter.mul_(scale)


@contextmanager
def applied(model: nn.Module, threshold: float, factors: Sequence[float] = ()) -> Iterator[None]:
    """Let ``model`` compute FATReLU while the block runs, with ``factors`` times the threshold in each layer."""
    ffns = gated_ffns(model)
    before = [ffn.act_fn for ffn in ffns]
    for ffn, factor in zip(ffns, factors or [1.0] * len(ffns), strict=True):
        ffn.act_fn = FatReLU(threshold * factor)
    try:
        yield
    finally:
        for ffn, act_fn in zip(ffns, before, strict=True):
            ffn.act_fn = act_fn
