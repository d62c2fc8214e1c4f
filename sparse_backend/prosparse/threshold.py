"""Step 3: the activation threshold, chosen by a sweep on held-out text under a loss budget."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sparse_backend.activation import Activation
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.gated_ffn import gated_ffns
from sparse_backend.prosparse.modeling import FatReLU
from sparse_backend.prosparse.tokens import HeldOutBlocks

# In units of the gate's root mean square, which differs between models: where it is 1, the paper's 0.01 does nothing.
SWEEP = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class SweepPoint:
    """What one threshold gives on held-out text."""

    threshold: float
    loss: float
    sparsity: float

    def rounded(self) -> dict[str, float]:
        """The point as the manifest records it."""
        return {"threshold": self.threshold, "loss": round(self.loss, 4), "sparsity": round(self.sparsity, 4)}


def choose(points: Sequence[SweepPoint], budget: float) -> SweepPoint:
    """The sparsest point whose loss is at most ``budget`` nats above that of the first, threshold 0."""
    affordable = [point for point in points if point.loss <= points[0].loss + budget]
    return max(affordable, key=lambda point: point.sparsity)


def sweep(model: nn.Module, blocks: HeldOutBlocks) -> list[SweepPoint]:
    """Measure a ReLU model under each threshold of ``SWEEP`` times its gate's scale, in rising order.

    Thresholds are rounded to three significant digits, so that what is measured is what config.json says.
    """
    scale = measure(model, blocks).gate_scale
    points = []
    for factor in SWEEP:
        threshold = float(f"{factor * scale:.3g}")
        with _threshold(model, threshold):
            measured = measure(model, blocks)
        points.append(SweepPoint(threshold, measured.loss, measured.mean_sparsity))
    return points


def activation_of(threshold: float) -> Activation:
    """ReLU for 0, else FATReLU."""
    return Activation(kind="fatrelu", threshold=threshold) if threshold > 0 else Activation(kind="relu")


@contextmanager
def _threshold(model: nn.Module, threshold: float) -> Iterator[None]:
    ffns = gated_ffns(model)
    before = [ffn.act_fn for ffn in ffns]
    for ffn in ffns:
        ffn.act_fn = FatReLU(threshold)
    try:
        yield
    finally:
        for ffn, act_fn in zip(ffns, before, strict=True):
            ffn.act_fn = act_fn
