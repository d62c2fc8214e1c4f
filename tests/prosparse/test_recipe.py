import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_backend.errors import UserError
from sparse_backend.prosparse import pretrain
from sparse_backend.prosparse.recipe import Recipe, TrainingRecipe
from sparse_backend.prosparse.recipe_file import presets, read_recipe
from sparse_backend.prosparse.recipe_flags import add_recipe_arguments, recipe_from

MINIMAL: dict[str, Any] = {"stages": [{"peak": 0, "steps": 10}, {"peak": 1e-4, "steps": 90}]}


def written(folder: Path, content: object) -> str:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def parsed(*flags: str) -> Recipe:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus")
    parser.add_argument("--corpus-name")
    add_recipe_arguments(parser)
    return recipe_from(parser.parse_args(flags))


# ProSparse (arXiv 2402.13516), tables 6 and 7: λ_i, T_i and the tokens up to there in billions.
PAPER = {
    "llama2-7b": [
        (0, 5_000, "10.49"),
        (5e-3, 6_000, "12.58"),
        (5e-2, 10_000, "20.97"),
        (5e-2, 12_000, "25.17"),
        (2e-1, 16_000, "33.55"),
        (2e-1, 16_500, "34.60"),
    ],
    "llama2-13b": [
        (0, 5_500, "46.14"),
        (5e-3, 6_750, "56.62"),
        (1e-2, 10_750, "90.18"),
        (1e-2, 11_000, "92.27"),
        (2e-2, 15_000, "125.83"),
        (2e-2, 16_000, "134.22"),
    ],
    "minicpm-1b": [
        (0, 10_000, "49.15"),
        (1e-3, 15_000, "73.73"),
        (5e-3, 20_000, "98.30"),
        (5e-3, 25_000, "122.88"),
        (5e-2, 35_000, "172.03"),
        (5e-2, 95_000, "466.94"),
    ],
}


@pytest.mark.parametrize("name", PAPER)
def test_preset_is_the_papers_stage_table(name: str) -> None:
    recipe = read_recipe(name)
    found = [
        (stage.peak, end, f"{end * recipe.training.step_tokens / 1e9:.2f}")
        for stage, end in zip(recipe.stages, recipe.stage_ends, strict=True)
    ]
    assert found == PAPER[name]
    schedule = recipe.l1_schedule
    for (before, begin, _), (after, end, _) in zip(PAPER[name][1:], PAPER[name][2:], strict=False):
        assert schedule.weight((begin + end) // 2) == pytest.approx((before + after) / 2)
        assert schedule.weight(end) == pytest.approx(after)


def test_minicpm_preset_ends_with_decay_and_the_papers_instruction_tuning() -> None:
    recipe = read_recipe("minicpm-1b")
    assert (recipe.training.learning_rate_schedule, recipe.last_stage_steps) == ("wsd", 60_000)
    sft = recipe.sft_run
    assert sft is not None
    assert recipe.sft is not None
    assert (sft.steps, recipe.sft.peak, recipe.steps + sft.steps) == (6_000, 1e-2, 101_000)
    tokens = recipe.steps * recipe.training.step_tokens + sft.steps * sft.step_tokens
    assert f"{tokens / 1e9:.2f}" == "473.02"
    assert sft.learning_rate_schedule == "constant"


@pytest.mark.parametrize("name", presets())
def test_every_preset_has_a_model_to_plan_for_and_says_what_it_is(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.model is not None
    assert recipe.description
    share = recipe.training.batch / recipe.hardware.devices
    assert share % (recipe.training.micro_batch or share) == 0
    if recipe.sft is not None:
        assert recipe.sft.batch % (recipe.sft.micro_batch * recipe.hardware.devices) == 0


def test_presets_models_have_the_sizes_in_their_names() -> None:
    parameters = {
        name: recipe.model.parameters for name in presets() if (recipe := read_recipe(name)).model is not None
    }
    assert parameters["llama2-7b"] == 6_738_415_616
    assert parameters["llama2-13b"] == 13_015_864_320
    assert parameters["demo"] == 7_344_384


def test_progressive_preset_is_the_papers_7b_table_stretched() -> None:
    recipe = read_recipe("progressive")
    peaks = [stage.peak for stage in recipe.stages]
    assert [peak / peaks[-1] for peak in peaks] == pytest.approx([0, 0.025, 0.25, 0.25, 1, 1])
    lengths = [stage.tokens or 0 for stage in recipe.stages]
    assert [length / sum(lengths) for length in lengths] == pytest.approx(
        [share / 16_500 for share in (5_000, 1_000, 4_000, 2_000, 4_000, 500)], rel=1e-6
    )
    assert recipe.steps == read_recipe("demo").steps


def test_file_may_extend_a_preset_and_says_only_what_differs(tmp_path: Path) -> None:
    content = "extends: llama2-7b\ntraining: {learning_rate: 1e-5}\ndata: {sources: [{path: texts}, {path: stdlib}]}\n"
    recipe = read_recipe(written(tmp_path, content))
    base = read_recipe("llama2-7b")
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.model_copy(update={"learning_rate": 3e-5}) == base.training
    assert recipe.stages == base.stages
    assert recipe.data is not None
    assert [source.path for source in recipe.data.sources] == [str(tmp_path / "texts"), "stdlib"]


def test_tokens_and_steps_may_be_mixed_and_are_added_up_before_rounding(tmp_path: Path) -> None:
    stages = [{"peak": 0, "tokens": 150}, {"peak": 1e-4, "tokens": 150}, {"peak": 1e-4, "steps": 3}]
    recipe = read_recipe(written(tmp_path, {"training": {"context": 10, "batch": 10}, "stages": stages}))
    assert recipe.stage_ends == (2, 3, 6)
    assert (recipe.run.tokens, recipe.run.steps) == (600, 6)


def test_stage_of_zero_alone_is_plain_relu_training(tmp_path: Path) -> None:
    schedule = read_recipe(written(tmp_path, {"stages": [{"peak": 0, "steps": 5}]})).l1_schedule
    assert {schedule.weight(step) for step in range(1, 7)} == {0.0}


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "stages: [{peak: 0, tokens: 2e6}, {peak: 3e-4, tokens: 1_000_000}]"))
    assert [stage.tokens for stage in recipe.stages] == [2_000_000, 1_000_000]
    assert recipe.stages[1].peak == 3e-4


def bad(**sections: Any) -> dict[str, Any]:
    return MINIMAL | sections


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bad(stages=[{"peak": 0.2, "steps": 5}, {"peak": 0.1, "steps": 5}]), ["stages.1.peak is 0.1", "never falls"]),
        (bad(stages=[{"peak": 0.1, "tokens": 0}]), ["stages.0.tokens is 0", "greater than 0"]),
        (bad(stages=[{"peak": 0.1, "steps": 0}]), ["stages.0.steps is 0"]),
        (bad(stages=[{"peak": -0.1, "steps": 5}]), ["stages.0.peak is -0.1"]),
        (bad(stages=[{"peak": NAN, "steps": 5}]), ["stages.0.peak is nan"]),
        (bad(stages=[{"peak": 0.1}]), ["stages.0", "'steps' or 'tokens'"]),
        (bad(stages=[{"peak": 0.1, "steps": 5, "tokens": 5}]), ["stages.0", "'steps' or 'tokens'"]),
        (bad(stages=[]), ["stages"]),
        (bad(stages=[{"peak": 0, "tokens": 10}, {"peak": 0.1, "tokens": 20}]), ["stages.1 has 20 tokens", "65536"]),
        ({}, ["stages is missing"]),
        (bad(threshold={"sweep": [-0.1, 0.5]}), ["threshold.sweep", "0 or more"]),
        (bad(threshold={"sweep": [0, NAN]}), ["threshold.sweep.1 is nan"]),
        (bad(threshold={"sweep": [0, INF]}), ["threshold.sweep.1 is inf"]),
        (bad(threshold={"sweep": [0.2, 0.1]}), ["threshold.sweep", "must rise"]),
        (bad(threshold={"sweep": []}), ["threshold.sweep"]),
        (bad(threshold={"budget": NAN}), ["threshold.budget is nan"]),
        (bad(l1={"reduction": "median"}), ["l1.reduction is 'median'", "mean_tokens_sum_dff"]),
        (bad(l1={"scale": 0}), ["l1.scale is 0"]),
        (bad(training={"learning_rat": 1}), ["unknown key 'training.learning_rat'", "'learning_rate'"]),
        (bad(stages=[{"peek": 0, "steps": 5}]), ["unknown key 'stages.0.peek'", "'peak'"]),
        (bad(sft={"data": {"sources": [{"pathh": "a"}]}}), ["unknown key 'sft.data.sources.0.pathh'", "'path'"]),
        (bad(lambda_=1), ["unknown key 'lambda_'", "Known here are"]),
        (bad(training={"batch": 10, "micro_batch": 4}), ["training", "10", "4"]),
        (bad(data={"sources": []}), ["data.sources"]),
        (bad(data={"sources": [{"path": "a", "weight": 0}]}), ["data.sources.0.weight is 0"]),
        (bad(data={"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}), ["'b' has no weight"]),
        (bad(data={"sources": [{"path": "a"}], "held_out": 0}), ["data.held_out is 0"]),
        (bad(sft={"peak": 1, "steps": 1, "learning_rate": 1, "batch": 1, "context": 8}), ["sft.peak is 1", "0.0001"]),
        (bad(target_sparsity=1.5), ["target_sparsity is 1.5"]),
        (bad(extends="llama3"), ["extends is 'llama3'", "llama2-7b"]),
        (bad(training=[1]), ["training"]),
        ([1, 2], ["mapping", "list"]),
        ("stages: [", ["cannot be read as YAML"]),
        ("stages: []\nstages: []\n", ["'stages' is there twice"]),
        ("l1: !!python/object/apply:os.getcwd []", ["cannot be read as YAML"]),
    ],
)
def test_unusable_recipe_is_refused_by_key(tmp_path: Path, content: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(written(tmp_path, content))
    assert "recipe.yaml" in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "Value error" not in str(caught.value)


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'llama2-70b' is neither a file on this machine nor a preset: demo"):
        read_recipe("llama2-70b")


def test_flags_replace_only_what_they_name() -> None:
    recipe = parsed(
        "--recipe", "demo", "--batch", "8", "--threshold-budget", "0.01", "--corpus", "texts", "--corpus-name", "mine"
    )
    demo = read_recipe("demo")
    assert recipe.training == demo.training.model_copy(update={"batch": 8})
    assert recipe.threshold.budget == 0.01
    assert recipe.data is not None
    assert (recipe.data.name, [source.path for source in recipe.data.sources]) == ("mine", ["texts"])
    assert [stage.tokens for stage in recipe.stages] == [stage.tokens for stage in demo.stages]
    assert parsed("--recipe", "demo") == demo


def test_default_is_one_lambda_from_the_first_step_on() -> None:
    default, demo = parsed(), read_recipe("demo")
    assert default == read_recipe("fixed-l1")
    assert (default.l1_schedule.relu_steps, [stage.peak for stage in default.stages]) == (0, [demo.stages[-1].peak])
    assert (default.steps, default.training, default.l1) == (demo.steps, demo.training, demo.l1)


def test_tokens_stretches_the_stages_and_l1_scales_them() -> None:
    recipe = parsed(
        "--recipe", "llama2-7b", "--tokens", "165000000", "--batch", "2", "--context", "5000", "--l1", "0.1"
    )
    recipe_of_paper = read_recipe("llama2-7b")
    assert recipe.stage_ends == recipe_of_paper.stage_ends
    assert [stage.peak for stage in recipe.stages] == pytest.approx(
        [stage.peak / 2 for stage in recipe_of_paper.stages]
    )


def test_stretching_to_whole_steps_adds_none() -> None:
    for steps in (40, 61, 997):
        recipe = parsed("--recipe", "progressive", "--context", "128", "--batch", "8", "--tokens", str(steps * 1024))
        assert recipe.steps == steps


@pytest.mark.parametrize(("name", "words"), [("llama2-7b", "no data"), ("minicpm-1b", "SFT phase without data")])
def test_preset_without_data_asks_for_it(name: str, words: str) -> None:
    corpus = ["--corpus", "texts"] if name == "minicpm-1b" else []
    with pytest.raises(UserError, match=words):
        parsed("--recipe", name, *corpus).require_data()


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
        (["--target-sparsity", "89"], ["--target-sparsity is 89", "less than 1"]),
        (["--warmup", "1.5"], ["--warmup"]),
        (["--batch", "10", "--micro-batch", "4"], ["--batch 10", "--micro-batch 4"]),
        (["--tokens", "300000", "--recipe", "progressive"], ["--tokens 300000", "stages.1 has", "65536"]),
    ],
)
def test_unusable_settings_are_refused_by_flag(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*flags)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "Value error" not in str(caught.value)


def test_recipe_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sparsify.md").read_text()
    recipe = read_recipe(written(tmp_path, page.split("```yaml\n")[1].split("```")[0]))
    assert [stage.name for stage in recipe.stages] == ["ReLU", "warm-up", "rise"]
    assert all(f"`{name}`" in page for name in presets())


def test_pretraining_has_no_last_stage_to_lower_the_rate_in(tmp_path: Path) -> None:
    arguments = argparse.ArgumentParser()
    pretrain.add_arguments(arguments)
    flags = [str(tmp_path / "out"), "--corpus", "stdlib", "--learning-rate-schedule", "wsd"]
    with pytest.raises(UserError, match="--learning-rate-schedule wsd"):
        pretrain.run(arguments.parse_args(flags))
