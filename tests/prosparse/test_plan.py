import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_backend.errors import UserError
from sparse_backend.prosparse.checkpoints import save_weights
from sparse_backend.prosparse.plan import memory_per_device, operations_per_token, plan
from sparse_backend.prosparse.recipe import Data, Recipe, Source, TrainingRecipe
from sparse_backend.prosparse.recipe_file import read_recipe
from tests.checkpoints import edit_config
from tests.prosparse.models import random_llama
from tests.prosparse.test_recipe import PAPER


def stage_rows(text: str) -> list[tuple[str, float, int, str]]:
    """(stage, λ, last step, tokens in billions) of each row of the plan's table."""
    rows = re.findall(r"^(\d+|SFT) .*?([\d.e-]+) +([\d,]+) +([\d.]+)$", text, re.MULTILINE)
    return [(stage, float(peak), int(end.replace(",", "")), tokens) for stage, peak, end, tokens in rows]


def with_context(recipe: Recipe, context: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"context": context})})


@pytest.mark.parametrize("name", PAPER)
def test_plan_of_a_preset_prints_the_papers_table(name: str) -> None:
    expected = [(str(index), peak, end, tokens) for index, (peak, end, tokens) in enumerate(PAPER[name])]
    if name == "minicpm-1b":
        expected.append(("SFT", 1e-2, 101_000, "473.02"))
    assert stage_rows(plan(read_recipe(name), None)) == expected


def test_dry_run_needs_no_gpu_and_no_model_and_takes_less_than_twenty_seconds() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-m", "sparse_backend.prosparse.job", "--recipe", "demo", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    assert stage_rows(finished.stdout) == [("0", 0, 46, "0.0030"), ("1", 3e-4, 916, "0.0600")]
    # Processor time: how long it takes where nothing else runs.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20


def test_plan_is_for_the_base_where_one_is_named(tmp_path: Path) -> None:
    save_weights(random_llama(hidden_act="silu"), tmp_path)
    text = plan(with_context(read_recipe("demo"), 64), tmp_path)
    assert "2 layers, d_model 32, d_ff 48" in text
    assert str(tmp_path) in text


def test_plan_refuses_what_the_job_would_refuse(tmp_path: Path) -> None:
    save_weights(random_llama(hidden_act="silu"), tmp_path)
    with pytest.raises(UserError, match="--context is 2048, BASE was made for 64"):
        plan(read_recipe("demo"), tmp_path)
    edit_config(tmp_path, intermediate_size=0)
    with pytest.raises(UserError, match=r"intermediate_size in its config\.json is 0"):
        plan(with_context(read_recipe("demo"), 64), tmp_path)
    with pytest.raises(UserError, match="no 'model' to plan for"):
        plan(read_recipe("demo").model_copy(update={"model": None}), None)


def test_plan_says_which_source_is_missing_and_what_share_each_has(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    sources = (Source(path=str(tmp_path / "texts"), name="prose", weight=3), Source(path="/no/such/place", weight=1))
    text = plan(read_recipe("demo").model_copy(update={"data": Data(sources=sources)}), None)
    assert "prose: 75.0% of the tokens\n" in text
    assert "/no/such/place: 25.0% of the tokens (NOT FOUND" in text


def test_plan_says_when_memory_does_not_suffice() -> None:
    recipe = read_recipe("llama2-7b")
    alone = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"devices": 1})})
    assert "DOES NOT FIT" not in plan(recipe, None)
    assert "DOES NOT FIT" in plan(alone, None)


def test_memory_is_at_least_the_states_and_falls_with_devices_and_recomputation() -> None:
    shape = read_recipe("llama2-7b").model
    assert shape is not None
    run = TrainingRecipe(context=4096, batch=8, micro_batch=1)
    alone, sharded = (memory_per_device(shape, run, devices) for devices in (1, 8))
    assert alone > 16 * shape.parameters
    assert alone - sharded > 16 * shape.parameters * 7 / 8
    recomputed = memory_per_device(shape, run.model_copy(update={"gradient_checkpointing": True}), 8)
    assert recomputed < sharded
    assert memory_per_device(shape, run.model_copy(update={"micro_batch": 2}), 8) > 1.3 * sharded


def test_operations_are_six_per_weight_and_token_where_the_context_is_short() -> None:
    shape = read_recipe("llama2-13b").model
    assert shape is not None
    assert operations_per_token(shape, 8) == pytest.approx(6 * (shape.parameters - 32000 * 5120), rel=1e-3)
    assert operations_per_token(shape, 4096) > 1.05 * operations_per_token(shape, 8)
