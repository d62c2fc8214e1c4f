import math

import pytest

from sparse_backend.prosparse.target import SparsityTarget


def simulate(controller: SparsityTarget, steps: range, sparsity: float, sensitivity: float = 0.05) -> float:
    """A model whose sparsity goes, a hundredth of the way each step, to what λ would give it: 90 % at 3e-5."""
    for step in steps:
        weight = controller.weight(step)
        final = 0.5 if weight == 0 else min(0.99, max(0.5, 0.9 + sensitivity * math.log(weight / 3e-5)))
        sparsity += 0.01 * (final - sparsity)
        if controller.is_observed(step):
            controller.observe(step, sparsity)
    return sparsity


@pytest.mark.parametrize("start", [3e-7, 3e-5, 1e-3])
@pytest.mark.parametrize("target", [0.8, 0.89, 0.95])
def test_target_is_reached_from_far_below_and_above(start: float, target: float) -> None:
    controller = SparsityTarget(target, 2000, 100, start)
    assert simulate(controller, range(1, 2001), 0.5) == pytest.approx(target, abs=0.01)


def test_stage_0_has_no_penalty_and_is_not_observed() -> None:
    controller = SparsityTarget(0.9, 1000, 50, 1e-5)
    assert controller.weight(50) == 0
    assert controller.weight(51) == 1e-5
    assert not any(controller.is_observed(step) for step in range(1, 51))


def test_weight_rises_by_a_fifth_at_most_and_stops_somewhere() -> None:
    controller = SparsityTarget(0.99, 200, 0, 1e-5)
    before = controller.weight(1)
    for step in range(1, 201):
        controller.observe(step, 0.0)
        assert controller.weight(step) <= 1.2 * before * (1 + 1e-12)
        before = controller.weight(step)
    assert before == pytest.approx(1e-1)


def test_restored_controller_goes_on_as_if_nothing_had_happened() -> None:
    whole = SparsityTarget(0.9, 1000, 50, 1e-6)
    reached = simulate(whole, range(1, 501), 0.5)
    resumed = SparsityTarget(0.9, 1000, 50, 1e-6)
    resumed.restore(whole.state())
    assert simulate(resumed, range(501, 1001), reached) == simulate(whole, range(501, 1001), reached)
