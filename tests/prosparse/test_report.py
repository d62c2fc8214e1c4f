import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.prosparse import controls, job
from sparse_backend.prosparse.report import markdown_table
from sparse_backend.prosparse.verify import verify
from sparse_backend.prosparse.workspace import Workspace, last_complete
from tests.prosparse.jobs import World, command, history

RUN = ["--context", 128, "--batch", 8, "--tokens", 20_000, "--l1", 1e-3]
PLOTS = {"training.png", "layers.png", "neurons.png", "threshold.png"}


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    assert command(job, world.base, out, "--corpus", world.corpus, *RUN, "--keep-held-out") == 0
    return out


def test_table_is_markdown() -> None:
    assert markdown_table(("run", "loss"), [("dense", "1.0")]) == "| run | loss |\n| -- | --: |\n| dense | 1.0 |"


def test_report_tells_what_the_manifest_does_and_shows_it(made: Path) -> None:
    manifest = Checkpoint.open(made).manifest
    assert manifest is not None
    report = (made / "report.md").read_text()
    for figure in (
        f"{manifest.held_out.sparsity:.2%} sparse",
        f"{manifest.held_out.loss:.4f}",
        manifest.command,
        "| corpus.jsonl |",
        f"| 1 | {manifest.layers[1].sparsity:.2%} |",
        "chosen |",
    ):
        assert figure in report
    for name in PLOTS:
        assert f"](report/{name})" in report
        assert (made / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert history(made)[-1]["step"] == 20
    assert list((made / "report" / "tensorboard" / "training").glob("events.*"))


def test_without_matplotlib_and_tensorboard_the_job_still_ends_with_a_report(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (sys.modules["sparse_backend.prosparse.report"], sys.modules["sparse_backend.prosparse.trainer"]):
        monkeypatch.setattr(module, "find_spec", lambda _name: None)
    assert command(job, world.base, tmp_path / "out", "--corpus", world.corpus, *RUN) == 0
    assert "TensorBoard is not installed" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "matplotlib was not installed" in report
    assert "](report/" not in report


def test_measurement_can_be_repeated_from_the_folder_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(Checkpoint.open(made))
    assert found.agrees
    assert (found.loss, found.sparsity) == pytest.approx((found.recorded_loss, found.recorded_sparsity), abs=1e-4)


def test_other_weights_do_not_pass_verification(made: Path) -> None:
    checkpoint = Checkpoint.open(made)
    assert checkpoint.manifest is not None
    held_out = checkpoint.manifest.held_out.model_copy(update={"loss": checkpoint.manifest.held_out.loss - 0.01})
    manifest = checkpoint.manifest.model_copy(update={"held_out": held_out})
    assert not verify(Checkpoint(made, checkpoint.config, checkpoint.activation, checkpoint.shards, manifest)).agrees


def test_target_is_steered_towards_and_said_how_far(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--context", 128, "--batch", 8, "--tokens", 200_000, "--learning-rate", 3e-3]
    out = tmp_path / "out"
    assert command(job, world.base, out, "--corpus", world.corpus, *arguments, "--target-sparsity", 0.75) == 0
    printed = capsys.readouterr().out
    assert "target: 75.00% before the threshold; reached" in printed
    manifest = Checkpoint.open(out).manifest
    assert manifest is not None
    # Sparsity follows λ late in a run of 196 steps. Without a target it ends at 0.85.
    assert manifest.phases[-1].settings["points"][0]["sparsity"] == pytest.approx(0.75, abs=0.05)
    assert manifest.phases[-2].settings["target_sparsity"] == 0.75


def test_controls_give_the_papers_table(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "controls"
    assert command(controls, world.base, out, "--corpus", world.corpus, *RUN, "--l1", 1e-2) == 0
    table = (out / "controls.md").read_text()
    assert table.split("seed 0, CPU.")[1].split("![")[0].strip() in capsys.readouterr().out
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    names = ["dense, continued", "vanilla ReLU", "shifted ReLU", "fixed L1"]
    names += ["ProSparse", "ProSparse, with threshold"]
    first = {row[0].removeprefix("| "): row for row in rows[2:8]}
    assert list(first) == names
    sparsity = {name: float(row[4].removesuffix("% |")) for name, row in first.items()}
    assert sparsity["dense, continued"] == 0
    assert sparsity["vanilla ReLU"] < min(sparsity["shifted ReLU"], sparsity["fixed L1"])
    assert sparsity["ProSparse"] < sparsity["ProSparse, with threshold"]
    assert first["dense, continued"][2] == "+0.00%"
    assert {path.name for path in out.glob("*.png")} == {"controls.png", "sweeps.png"}
    assert not list(out.rglob("*.safetensors"))


def test_other_recipes_run_beside_the_chosen_controls(world: World, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        (tmp_path / f"{name}.yaml").write_text(
            f"training: {{learning_rate: 1e-3, seed: {seed}}}\nstages: [{{peak: 1e-2, tokens: 20_000}}]\n"
            "threshold: {sweep: [0, 0.1], per_layer: false}\n"
        )
    others = ["--also", tmp_path / "one.yaml", tmp_path / "other.yaml"]
    flags = ["--corpus", world.corpus, "--context", 128, "--batch", 8, "--tokens", 20_000]
    out = tmp_path / "controls"
    assert command(controls, world.base, out, *flags, "--runs", "fixed", *others) == 0
    rows = json.loads((out / "controls.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "fixed L1",
        *(f"{name}{step}" for name in ("one", "other") for step in ("", ", with threshold")),
    ]
    assert rows[1]["loss"] != rows[3]["loss"]
    assert rows[2]["sparsity"] == pytest.approx(rows[2]["threshold"]["sparsity"], abs=1e-3)
    assert rows[2]["threshold"] in rows[2]["sweep"]
    assert "above dense" in (out / "controls.md").read_text()


def test_a_run_keeps_its_weights_until_it_is_recorded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Workspace.record

    def killed(workspace: Workspace, phase: str, result: Mapping[str, Any]) -> None:
        if phase == "fixed-L1":
            raise KeyboardInterrupt
        record(workspace, phase, result)

    arguments = [world.base, tmp_path / "out", "--corpus", world.corpus, *RUN, "--runs", "fixed"]
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            command(controls, *arguments)
    saved = last_complete(tmp_path / "out.partial" / "fixed-L1")
    assert saved is not None
    assert saved[0].name == "checkpoint-20"
    assert command(controls, *arguments) == 0


def test_runs_in_two_processes_are_the_same_and_outlive_one_that_fails(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, rate in (("good", 1e-3), ("diverging", 1e20)):
        (tmp_path / f"{name}.yaml").write_text(
            f"training: {{learning_rate: {rate}}}\nstages: [{{peak: 1e-2, tokens: 20_000}}]\nthreshold: {{sweep: [0]}}\n"
        )
    flags = ["--corpus", world.corpus, "--context", 128, "--batch", 8, "--tokens", 20_000, "--runs", "relu"]
    both = ["--also", tmp_path / "diverging.yaml", tmp_path / "good.yaml"]
    assert command(controls, world.base, tmp_path / "two", *flags, *both, "--parallel", 2) == 2
    assert "1 of 2 processes failed" in (printed := capfd.readouterr().err)
    assert "became" in printed
    found = {path.stem for path in (tmp_path / "two.partial" / "phases").iterdir()}
    assert found == {"base", "vanilla-ReLU", "good"}
    assert command(controls, world.base, tmp_path / "one", *flags, "--also", tmp_path / "good.yaml") == 0
    alone = json.loads((tmp_path / "one" / "controls.json").read_text())["rows"]
    beside = [
        row
        for run in ("vanilla-ReLU", "good")
        for row in json.loads((tmp_path / "two.partial" / "phases" / f"{run}.json").read_text())["rows"]
    ]
    assert [row["loss"] for row in beside] == pytest.approx([row["loss"] for row in alone], rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("training: {context: 64}\nstages: [{peak: 1e-3, tokens: 20_000}]", "its data or training.context is not"),
        ("training: {context: 128, batch: 8}\nstages: [{peak: 1e-3, tokens: 90_000}]", "90,112 tokens"),
    ],
)
def test_recipe_that_cannot_be_compared_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, words: str
) -> None:
    (tmp_path / "main.yaml").write_text(
        "training: {context: 128, batch: 8}\nstages: [{peak: 1e-3, tokens: 10_000}, {peak: 1e-2, tokens: 10_000}]"
    )
    (tmp_path / "one.yaml").write_text(recipe)
    arguments = ["--corpus", world.corpus, "--recipe", tmp_path / "main.yaml", "--also", tmp_path / "one.yaml"]
    assert command(controls, world.base, tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_controls_refuse_a_recipe_that_makes_two_of_them_the_same(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [world.base, tmp_path / "out", "--corpus", world.corpus, *RUN, "--recipe", "demo"]
    assert command(controls, *arguments) == 2
    assert "Take --recipe progressive" in capsys.readouterr().err
