import argparse

import pytest

from sparse_backend.errors import UserError
from sparse_backend.prosparse.recipe import SparsifyRecipe, TrainingRecipe, add_flags, with_flags


def parsed(*flags: str) -> SparsifyRecipe:
    parser = argparse.ArgumentParser()
    add_flags(parser, SparsifyRecipe)
    return with_flags(SparsifyRecipe(), parser.parse_args(flags))


def test_flags_replace_only_what_they_name() -> None:
    recipe = parsed("--l1", "2e-4", "--schedule", "progressive", "--batch", "8")
    assert (recipe.l1, recipe.schedule, recipe.batch) == (2e-4, "progressive", 8)
    assert recipe.tokens == SparsifyRecipe().tokens


def test_steps_reach_the_tokens() -> None:
    recipe = TrainingRecipe(tokens=1001, context=10, batch=10)
    assert (recipe.step_tokens, recipe.steps, recipe.pass_sequences) == (100, 11, 10)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "0"], ["--tokens is 0", "greater than 0"]),
        (["--tokens", "-5"], ["--tokens"]),
        (["--seed", "4294967296"], ["--seed is 4294967296", "less than 4294967296"]),
        (["--l1", "nan"], ["--l1 is nan"]),
        (["--l1=-1e-5"], ["--l1", "greater than or equal to 0"]),
        (["--learning-rate", "inf"], ["--learning-rate is inf"]),
        (["--learning-rate", "0"], ["--learning-rate"]),
        (["--threshold-budget", "nan"], ["--threshold-budget"]),
        (["--threshold-budget", "-0.1"], ["--threshold-budget"]),
        (["--relu-share", "1"], ["--relu-share"]),
        (["--warmup", "1.5"], ["--warmup"]),
        (["--batch", "10", "--micro-batch", "4"], ["--batch 10", "--micro-batch 4"]),
        (["--tokens", "300000", "--schedule", "progressive"], ["--tokens 300000 makes 5 steps", "progressive"]),
        (["--tokens", "100000", "--relu-share", "0.9"], ["--relu-share 0.9", "must rise"]),
    ],
)
def test_unusable_settings_are_refused_by_flag(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*flags)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "Value error" not in str(caught.value)


def test_schedule_covers_the_whole_run() -> None:
    recipe = parsed("--schedule", "progressive", "--relu-share", "0.25", "--l1", "1e-4")
    schedule = recipe.l1_schedule
    assert schedule.relu_steps == round(0.25 * recipe.steps)
    assert schedule.stages[-1].end == recipe.steps
    assert schedule.weight(recipe.steps) == 1e-4
