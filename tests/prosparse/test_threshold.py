import pytest
import torch

from sparse_backend.prosparse import threshold
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.modeling import FatReLU
from sparse_backend.prosparse.threshold import SWEEP, SweepPoint, choose, sweep
from sparse_backend.prosparse.tokens import HeldOutBlocks
from tests.prosparse.models import random_llama, random_tokens

POINTS = [
    SweepPoint(0.0, 2.000, 0.80),
    SweepPoint(0.1, 1.999, 0.82),
    SweepPoint(0.2, 2.004, 0.85),
    SweepPoint(0.3, 2.006, 0.90),
    SweepPoint(0.4, 2.003, 0.91),
]


@pytest.mark.parametrize(("budget", "chosen"), [(0.0, 0.1), (0.003001, 0.4), (0.005, 0.4), (1.0, 0.4)])
def test_sparsest_affordable_point_is_chosen(budget: float, chosen: float) -> None:
    assert choose(POINTS, budget).threshold == chosen


def test_a_rise_that_costs_too_much_leaves_relu() -> None:
    points = [SweepPoint(0.0, 2.0, 0.8), SweepPoint(0.1, 2.1, 0.9)]
    assert choose(points, 0.05).threshold == 0.0
    assert threshold.activation_of(0.0).kind == "relu"
    assert threshold.activation_of(0.1).kind == "fatrelu"


def test_sweep_measures_each_threshold_in_units_of_the_gate() -> None:
    model = random_llama()
    blocks = HeldOutBlocks(random_tokens(6, 16).flatten(), 16)
    points = sweep(model, blocks)
    scale = measure(model, blocks).gate_scale
    assert [point.threshold for point in points] == pytest.approx([factor * scale for factor in SWEEP], rel=6e-3)
    sparsities = [point.sparsity for point in points]
    assert sparsities == sorted(sparsities)
    assert sparsities[0] == pytest.approx(measure(model, blocks).mean_sparsity)
    assert sparsities[-1] > sparsities[0] + 0.1
    # The recorded threshold gives the recorded figures.
    for layer in model.model.layers:
        layer.mlp.act_fn = FatReLU(points[-1].threshold)
    again = measure(model, blocks)
    assert (again.loss, again.mean_sparsity) == (points[-1].loss, points[-1].sparsity)


def test_sweep_leaves_the_model_as_it_was() -> None:
    model = random_llama()
    tokens = random_tokens(2, 16)
    before = model(tokens).logits
    sweep(model, HeldOutBlocks(tokens.flatten(), 16))
    assert torch.equal(model(tokens).logits, before)
