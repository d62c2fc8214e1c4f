import math
from itertools import pairwise

import pytest

from sparse_backend.prosparse.schedule import L1Schedule, Stage

# ProSparse, table 6: the 7B run.
PAPER = L1Schedule(
    5_000, [Stage(6_000, 5e-3), Stage(10_000, 5e-2), Stage(12_000, 5e-2), Stage(16_000, 2e-1), Stage(16_500, 2e-1)]
)


@pytest.mark.parametrize(
    ("step", "weight"),
    [
        (1, 0.0),
        (5_000, 0.0),
        (5_001, 5e-3),
        (6_000, 5e-3),
        (8_000, (5e-3 + 5e-2) / 2),
        (10_000, 5e-2),
        (11_000, 5e-2),
        (12_000, 5e-2),
        (14_000, (5e-2 + 2e-1) / 2),
        (16_000, 2e-1),
        (16_500, 2e-1),
        (20_000, 2e-1),
    ],
)
def test_papers_7b_stages_at_their_ends_and_midpoints(step: int, weight: float) -> None:
    assert PAPER.weight(step) == pytest.approx(weight, rel=1e-12)


def test_rise_is_the_papers_sine() -> None:
    step, before, after = 7_000, 5e-3, 5e-2
    eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * (step - 6_000) / 4_000) + 1)
    assert PAPER.weight(step) == pytest.approx(before + eta * (after - before), rel=1e-12)


def test_weight_never_falls_nor_jumps_after_the_warm_up() -> None:
    weights = [PAPER.weight(step) for step in range(5_001, 16_501)]
    rises = [after - before for before, after in pairwise(weights)]
    assert min(rises) >= 0
    # The steepest slope of a half sine wave is π/2 times its mean.
    assert max(rises) <= math.pi / 2 * 0.15 / 4_000 * 1.001


def test_one_stage_is_constant_from_the_end_of_the_relu_stage() -> None:
    schedule = L1Schedule(10, [Stage(100, 3e-5)])
    assert {schedule.weight(step) for step in range(1, 11)} == {0.0}
    assert {schedule.weight(step) for step in range(11, 101)} == {3e-5}


@pytest.mark.parametrize(
    ("relu_steps", "stages", "fault"),
    [
        (0, [Stage(10, 0.1), Stage(20, 0.05)], "never fall"),
        (0, [Stage(10, -0.1)], "never fall"),
        (0, [Stage(10, math.nan)], "0 or more"),
        (0, [Stage(10, math.inf)], "0 or more"),
        (10, [Stage(10, 0.1)], "must rise"),
        (0, [Stage(10, 0.1), Stage(10, 0.2)], "must rise"),
        (-1, [Stage(10, 0.1)], "must rise"),
    ],
)
def test_impossible_schedules_are_refused(relu_steps: int, stages: list[Stage], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        L1Schedule(relu_steps, stages)
