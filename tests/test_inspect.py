import argparse
import json
from pathlib import Path

import pytest

from sparse_backend import inspect
from sparse_backend.checkpoint import sha256_of
from sparse_backend.errors import UserError
from tests.checkpoints import edit_config, write_tiny_checkpoint
from tests.test_checkpoint import manifest_for


def inspected(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    assert inspect.run(parser.parse_args([str(folder), *flags])) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")


def test_json_says_what_the_folder_and_its_manifest_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest_for(folder).write(folder)
    found = json.loads(inspected(folder, capsys, "--json"))
    assert (found["architecture"], found["activation"], found["threshold"]) == ("LlamaForCausalLM", "relu", 0.0)
    assert (found["layers"], found["d_model"], found["d_ff"]) == (2, 64, 256)
    assert found["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    manifest = found["manifest"]
    assert manifest["files"]["model.safetensors"] == sha256_of(folder / "model.safetensors")
    assert manifest["held_out"] == {"tokens": 200, "loss": 3.0, "base_loss": 2.9, "sparsity": 0.9}
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
