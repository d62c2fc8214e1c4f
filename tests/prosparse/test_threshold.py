import pytest
import torch

from sparse_backend.prosparse import threshold
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.gated_ffn import gated_ffns
from sparse_backend.prosparse.modeling import FatReLU
from sparse_backend.prosparse.recipe import SWEEP, ThresholdRecipe
from sparse_backend.prosparse.threshold import SweepPoint, choose, sweep
from sparse_backend.prosparse.tokens import HeldOutBlocks
from tests.prosparse.models import random_llama, random_tokens

POINTS = [
    SweepPoint(0.0, 2.000, 0.80),
    SweepPoint(0.1, 1.999, 0.82),
    SweepPoint(0.2, 2.004, 0.85),
    SweepPoint(0.3, 2.006, 0.90),
    SweepPoint(0.4, 2.003, 0.91),
]
ONE_FOR_ALL = ThresholdRecipe(per_layer=False)


@pytest.mark.parametrize(("budget", "chosen"), [(0.0, 0.1), (0.003001, 0.4), (0.005, 0.4), (1.0, 0.4)])
def test_sparsest_affordable_point_is_chosen(budget: float, chosen: float) -> None:
    assert choose(POINTS, budget).threshold == chosen


@pytest.mark.parametrize(("target", "chosen"), [(0.81, 0.1), (0.83, 0.4), (0.95, 0.4)])
def test_target_is_met_at_the_lowest_loss_and_otherwise_approached(target: float, chosen: float) -> None:
    assert choose(POINTS, 0.01, target).threshold == chosen


def test_a_rise_that_costs_too_much_leaves_relu() -> None:
    points = [SweepPoint(0.0, 2.0, 0.8), SweepPoint(0.1, 2.1, 0.9)]
    assert choose(points, 0.05).threshold == 0.0
    assert threshold.activation_of(0.0).kind == "relu"
    assert threshold.activation_of(0.1).kind == "fatrelu"


@pytest.mark.parametrize(("sparsity", "wins"), [(0.911, False), (0.92, True)])
def test_thresholds_per_layer_are_taken_only_if_they_win(sparsity: float, wins: bool) -> None:
    own = SweepPoint(0.3, 2.001, sparsity, (0.5, 2.0))
    assert (choose([*POINTS, own], 0.005) is own) == wins


def test_sweep_measures_each_threshold_in_units_of_the_gate() -> None:
    model = random_llama()
    blocks = HeldOutBlocks(random_tokens(6, 16).flatten(), 16)
    points = sweep(model, blocks, ONE_FOR_ALL)
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


def test_absolute_sweep_takes_thresholds_as_they_are() -> None:
    blocks = HeldOutBlocks(random_tokens(2, 16).flatten(), 16)
    recipe = ThresholdRecipe(sweep=(0.01, 0.03), unit="absolute", per_layer=False)
    # Plain ReLU comes first even where the recipe does not list it: the budget is counted from it.
    assert [point.threshold for point in sweep(random_llama(), blocks, recipe)] == [0.0, 0.01, 0.03]


def test_folded_weights_do_exactly_what_thresholds_per_layer_did() -> None:
    model = random_llama().to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(4.0)
    blocks = HeldOutBlocks(random_tokens(6, 16).flatten(), 16)
    point = sweep(model, blocks, ThresholdRecipe())[-1]
    assert len(set(point.factors)) == 2
    threshold.fold(model, point.factors)
    for ffn in gated_ffns(model):
        ffn.act_fn = FatReLU(point.threshold)
    folded = measure(model, blocks)
    assert (folded.loss, folded.mean_sparsity) == (point.loss, point.sparsity)


def test_sweep_leaves_the_model_as_it_was() -> None:
    model = random_llama()
    tokens = random_tokens(2, 16)
    before = model(tokens).logits
    sweep(model, HeldOutBlocks(tokens.flatten(), 16), ThresholdRecipe())
    assert torch.equal(model(tokens).logits, before)
