import sys
from pathlib import Path

import pytest

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.prosparse import controls, job
from sparse_backend.prosparse.report import markdown_table
from sparse_backend.prosparse.verify import verify
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
    assert manifest.phases[-1].settings["points"][0]["sparsity"] == pytest.approx(0.75, abs=0.03)
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
    assert {path.name for path in out.glob("*.png")} == {"controls.png"}
    assert not list(out.rglob("*.safetensors"))


def test_controls_refuse_a_recipe_that_makes_two_of_them_the_same(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [world.base, tmp_path / "out", "--corpus", world.corpus, *RUN, "--recipe", "demo"]
    assert command(controls, *arguments) == 2
    assert "Take --recipe progressive" in capsys.readouterr().err
