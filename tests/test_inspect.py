import argparse
import json
import shutil
from pathlib import Path

import pytest

from server import cli
from sparse_backend import inspect
from sparse_backend.checkpoint import sha256_of
from sparse_backend.errors import UserError
from tests.checkpoints import edit_config, write_tiny_checkpoint
from tests.test_checkpoint import DAMAGE, manifest_for


def inspected(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    assert inspect.run(parser.parse_args([str(folder), *flags])) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint without a manifest."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


def test_json_says_what_the_folder_and_its_manifest_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest_for(folder).write(folder)
    found = json.loads(inspected(folder, capsys, "--json"))
    assert (found["architecture"], found["activation"], found["threshold"]) == ("LlamaForCausalLM", "relu", 0.0)
    assert (found["layers"], found["d_model"], found["d_ff"]) == (2, 64, 256)
    assert found["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    manifest = found["manifest"]
    assert manifest["files"]["model.safetensors"] == sha256_of(folder / "model.safetensors")
    known = {"tokens": 200, "loss": 3.0, "base_loss": 2.9, "sparsity": 0.9}
    assert manifest["held_out"] == {**known, "context": None, "text_sha256": None}
    assert manifest["layers"][1] == {
        "layer": 1,
        "sparsity": 0.9,
        "rare_neurons": 1,
        "frequent_neurons": 1,
        "highest_frequency": 0.6,
    }


def test_tables_name_every_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest_for(folder).write(folder)
    text = inspected(folder, capsys)
    for expected in (
        "LlamaForCausalLM",
        "ReLU",
        "90.00%",
        "3.0000",
        "ReLU substitution, 1 steps, 100 tokens",
        "learning_rate",
        "prosparse sparsify base out --corpus stdlib",
        sha256_of(folder / "model.safetensors"),
    ):
        assert expected in text


def test_folder_without_a_manifest_is_described_and_said_to_have_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(folder, hidden_act="fatrelu", hidden_act_param=0.01, architectures=["SparseLlamaForCausalLM"])
    text = inspected(folder, capsys)
    assert "FATReLU, threshold 0.01" in text
    assert "No prosparse.json" in text
    assert json.loads(inspected(folder, capsys, "--json"))["manifest"] is None


def test_changed_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest_for(folder).write(folder)
    edit_config(folder, rms_norm_eps=0.1)
    with pytest.raises(UserError, match=r"config\.json"):
        inspected(folder, capsys)


def test_manifest_is_printed_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_for(folder)
    settings = {"a": [1, 2.5], "b": {"c": ["d"]}, "e": [{"f": "g", "h": 0.5}], "i": None}
    phase = manifest.phases[0].model_copy(update={"settings": settings})
    manifest.model_copy(update={"command": "[/b] :smile: [red]out[/red]", "phases": [phase]}).write(folder)
    lines = [" ".join(line.split()) for line in inspected(folder, capsys).splitlines()]
    for expected in ("made by [/b] :smile: [red]out[/red]", "a 1", "2.5", "b c d", "e f g, h 0.5", "i None"):
        assert expected in lines


def test_folder_name_is_printed_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "[demo] v1" in inspected(folder.rename(folder.with_name("[demo] v1")), capsys)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder_ends_the_command_with_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, words = DAMAGE[case]
    manifest_for(folder).write(folder)
    damage(folder)
    assert cli.main(["inspect", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prosparse: error: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
