"""Runs that are killed, run out of disk, or diverge: the same command goes on, and nothing good is lost."""

import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sparse_backend.errors import UserError
from sparse_backend.prosparse import job
from sparse_backend.prosparse.checkpoints import load_model
from sparse_backend.prosparse.corpus import read_corpus
from sparse_backend.prosparse.recipe import TrainingRecipe
from sparse_backend.prosparse.tokens import Text, read_text
from sparse_backend.prosparse.trainer import Runtime, train
from sparse_backend.prosparse.workspace import last_complete
from tests.prosparse.jobs import World, command, history, start

RUN = ["--recipe", "demo", "--context", 128, "--batch", 8, "--tokens", 40_000, "--l1", 1e-3]
RUN += ["--save-every", 3, "--progress-every", 1]


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert command(job, world.base, out, "--corpus", world.corpus, *RUN) == 0
    return out


def kill_once(process: subprocess.Popen[str], due: Callable[[str], bool]) -> None:
    """SIGKILL as soon as a line of output says so."""
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if due(line):
                process.kill()
                return
    pytest.fail("the process ended before it was killed")


def test_killed_run_resumes_to_the_same_loss_curve(
    world: World, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [world.base, out, "--corpus", world.corpus, *RUN]
    kill_once(start("job", *arguments), lambda line: line.startswith("step 13/40"))
    # The second is killed while it saves a checkpoint, as likely as not.
    kill_once(start("job", *arguments), lambda line: line.startswith("step 27/40"))
    saved = last_complete(tmp_path / "out.partial" / "trainer")
    assert saved is not None
    step = saved[0].name.removeprefix("checkpoint-")
    capfd.readouterr()
    assert command(job, *arguments) == 0
    assert f"resuming after step {step} of 40" in capfd.readouterr().out
    expected, found = history(unbroken), history(out)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for name in ("loss", "eval_loss", "lambda", "sparsity", "learning_rate"):
        assert [entry.get(name) for entry in found] == [
            None if name not in entry else pytest.approx(entry[name], rel=1e-3) for entry in expected
        ]
    seconds = [entry["seconds"] for entry in found if "seconds" in entry]
    assert seconds == sorted(seconds)
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_step_by_step_gives_what_one_run_does(
    world: World, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [world.base, out, "--corpus", world.corpus, *RUN]
    for phase, checkpoint in (("relu", "checkpoint-2"), ("training", "checkpoint-40")):
        assert command(job, *arguments, "--stop-after", phase) == 0
        assert "as --stop-after asks" in capsys.readouterr().out
        assert not out.exists()
        assert (tmp_path / "out.partial" / "trainer" / checkpoint / "complete.json").is_file()
    # Step 3 has no part in training: its settings may still change.
    assert command(job, *arguments, "--threshold-budget", 0.5) == 0
    assert "step  1/40" not in capsys.readouterr().out
    one, other = (load_file(folder / "model.safetensors") for folder in (unbroken, out))
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(other[down], one[down])
    assert other[up].shape == one[up].shape


def test_unfinished_run_with_other_settings_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [world.base, tmp_path / "out", "--corpus", world.corpus, *RUN]
    assert command(job, *arguments, "--stop-after", "relu") == 0
    assert command(job, *arguments, "--learning-rate", 2e-3) == 2
    assert "recipe.training.learning_rate is 0.001 there, 0.002 here" in capsys.readouterr().err


def test_full_disk_leaves_the_last_good_checkpoint(world: World, tmp_path: Path) -> None:
    arguments = [world.base, tmp_path / "out", "--corpus", world.corpus, *RUN]
    assert command(job, *arguments, "--stop-after", "relu") == 0
    process = start("job", *arguments)
    # No file may grow beyond this: what the Trainer saves does, what comes before does not.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "The checkpoint of step 3 cannot be written" in output
    assert "The last good checkpoint is" in output
    assert "Traceback" not in output
    saved = last_complete(tmp_path / "out.partial" / "trainer")
    assert saved is not None
    assert saved[0].name == "checkpoint-2"
    assert load_file(saved[0] / "model.safetensors")
    assert command(job, *arguments) == 0


class Exploding:
    """λ that goes beyond what float32 can hold after step 10."""

    relu_steps = 2

    def weight(self, step: int) -> float:
        return 1e-3 if step <= 10 else 1e38


def text_of(world: World) -> Text:
    return read_text(read_corpus(str(world.corpus)), AutoTokenizer.from_pretrained(world.base), 128)


def test_nan_is_refused_before_it_is_saved(world: World, tmp_path: Path) -> None:
    model = load_model(world.base, torch.float32, hidden_act="relu")
    recipe = TrainingRecipe(context=128, batch=8, tokens=40_000)
    runtime = Runtime(torch.device("cpu"), progress_every=1, save_every=1)

    with pytest.raises(UserError, match=r"became (nan|inf) by step 1[12].*checkpoint-1[01]"):
        train(model, text_of(world), recipe, runtime, tmp_path, schedule=Exploding())
    saved = last_complete(tmp_path)
    assert saved is not None
    weights = load_file(saved[0] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_unreadable_checkpoint_is_named(world: World, tmp_path: Path) -> None:
    recipe = TrainingRecipe(context=128, batch=8, tokens=20_000)
    runtime = Runtime(torch.device("cpu"), save_every=4)
    text = text_of(world)

    def run(stop_after: int | None) -> None:
        train(load_model(world.base, torch.float32), text, recipe, runtime, tmp_path, stop_after=stop_after)

    run(8)
    shard = tmp_path / "checkpoint-8" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[:8] = b"\xff" * 8
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-8' cannot be read.*Delete this folder"):
        run(None)
    for path in sorted(shard.parent.iterdir()):
        path.unlink()
    shard.parent.rmdir()
    run(None)
    assert (tmp_path / "checkpoint-20" / "complete.json").is_file()


def test_two_processes_take_the_course_of_one(world: World, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("job", world.base, out, "--corpus", world.corpus, *RUN, "--device", "cpu", processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("wrote ") == 1
    expected = {entry["step"]: entry["loss"] for entry in history(unbroken) if "loss" in entry}
    found = {entry["step"]: entry["loss"] for entry in history(out) if "loss" in entry}
    assert found == {step: pytest.approx(loss, rel=5e-3) for step, loss in expected.items()}
