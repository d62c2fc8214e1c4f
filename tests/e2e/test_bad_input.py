"""Each mistake a user can make at the command line: one paragraph that names the culprit, no traceback, status 2."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from server import cli
from sparse_backend.checkpoint import MANIFEST_NAME
from tests.checkpoints import edit_config, write_tiny_checkpoint
from tests.e2e.conftest import DEMO
from tests.e2e.servers import PROSPARSE, free_port


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


def fail(*words: object, **environment: str) -> str:
    """Run ``prosparse serve``, which must refuse; returns what it says."""
    done = subprocess.run(
        [PROSPARSE, "serve", *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("prosparse: error: ")
    # Progress may come first; the error itself is one paragraph.
    assert done.stderr.count("prosparse: error: ") == 1
    return last


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def truncate_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("garbage")


def replace_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (remove_tokenizer, ["no tokenizer", "tokenizer.json"]),
    (spoil_tokenizer, ["tokenizer.json", "cannot be read as JSON"]),
    (truncate_shard, ["model.safetensors", "not a complete safetensors file"]),
    (replace_shard, ["no *.safetensors", "pytorch_model.bin"]),
    (lambda folder: edit_config(folder, hidden_act="silu"), ["Swish", "prosparse sparsify"]),
    (
        lambda folder: edit_config(folder, hidden_act="fatrelu", hidden_act_param=float("nan")),
        ["hidden_act_param is nan"],
    ),
    (lambda folder: edit_config(folder, architectures=["OPTForCausalLM"]), ["OPTForCausalLM", "have no gate"]),
    (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_inspect(folder, damage, expected, capsys):
    damage(folder)
    assert cli.main(["inspect", str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("prosparse: error: ")
    assert shown.err.count("\n") == 1
    assert all(part in shown.err for part in expected)


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_checkpoint(folder, damage, expected):
    damage(folder)
    before = sorted(folder.iterdir())
    text = fail(folder)
    assert all(part in text for part in expected)
    assert sorted(folder.iterdir()) == before


def test_wrong_folder(tmp_path):
    assert "is not a folder on this machine" in fail(tmp_path / "absent")


def test_sha256_that_disagrees_with_the_manifest(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    text = fail(folder)
    assert shard.name in text
    assert MANIFEST_NAME in text
    assert json.loads((folder / MANIFEST_NAME).read_text())["files"][shard.name][:16] in text


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["--prot", "1"], {}, ["unknown flag --prot", "did you mean --port?"]),
        ([], {"PROSPARSE_PROT": "1"}, ["PROSPARSE_PROT", "did you mean PROSPARSE_PORT?"]),
        ([], {"PROSPARSE_CPU_ISA": "avx3"}, ["PROSPARSE_CPU_ISA is 'avx3'", "avx2"]),
        (["--", "--max-model-len", "257"], {}, ["--max-model-len 257", "256 tokens"]),
        (["--", "--max-num-sequences", "4"], {}, ["has no flag --max-num-sequences", "did you mean --max-num-seqs?"]),
        (["--", "--max-num-seqs", "0"], {}, ["max_num_seqs"]),
        (["--", "--trust-remote-code"], {}, ["--trust-remote-code is refused"]),
        (["--", "--help"], {}, ["--help is refused", "vllm serve --help"]),
        (["--", "--data-parallel-rank", "1"], {}, ["--data-parallel-rank is refused"]),
        (["--host", "203.0.113.1"], {}, ["cannot listen on 203.0.113.1"]),
    ],
)
def test_flags_and_environment(tiny, words, environment, expected):
    text = fail(tiny, "--port", free_port(), *words, **environment)
    assert all(part in text for part in expected)


def test_port_in_use(tiny):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        text = fail(tiny, "--port", port)
    assert f"--port {port}" in text
    assert "Address already in use" in text
