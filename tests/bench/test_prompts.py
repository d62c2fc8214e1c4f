from pathlib import Path
from types import ModuleType

import pytest

from server.cli import main
from sparse_backend.bench import decode, parity
from sparse_backend.bench.prompts import held_out_prompts
from sparse_backend.errors import UserError
from sparse_backend.ffn import native
from tests.checkpoints import write_tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model")


def test_a_corpus_of_short_documents_is_refused(tmp_path: Path, folder: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(500)))
    with pytest.raises(UserError, match=r"--corpus: no held-out document of .* is 32 tokens long"):
        held_out_prompts(folder, str(corpus), 1, 32)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("decode", ["--tokens", "0"], "--tokens"),
        ("decode", ["--rounds", "0"], "--rounds"),
        ("decode", ["--dtype", "float16"], "--dtype"),
        # 256 tokens of context: 32 of prompt, one to end the prefill, 223.
        ("decode", ["--tokens", "224"], "context of 256"),
        ("decode", ["--prefill", "256"], "context of 256"),
        ("decode", ["--fp8"], "--fp8 needs a GPU"),
        ("decode", ["--density", "0.2"], "are for --synthetic"),
        ("decode", ["--synthetic", "tiny"], "not allowed with"),
        ("parity", ["--prompts", "0"], "--prompts"),
        ("parity", ["--tokens", "225"], "context of 256"),
    ],
)
def test_impossible_runs_are_refused_before_an_engine_starts(
    folder: Path, command: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", command, "--model", str(folder), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model --synthetic is required"),
        (["--synthetic", "70b"], "invalid choice"),
        (["--synthetic", "tiny", "--density", "0.1,0.2"], "for one model"),
        (["--synthetic", "tiny", "--density", "0.1", "--frequencies", "file.npz"], "for one model"),
        (["--synthetic", "tiny", "--frequencies", "missing.npz"], "missing.npz cannot be read"),
        (["--synthetic", "tiny", "--tokens", "4096"], "context of 4096"),
    ],
)
def test_impossible_models_are_refused_before_an_engine_starts(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", *flags]) == 2
    assert words in capsys.readouterr().err


def test_parity_is_no_comparison_where_one_path_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match="the dense path with itself"):
        parity.run(None)


@pytest.mark.parametrize("command", [decode, parity])
def test_the_reference_is_not_measured(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(_device_type: str) -> None:
        raise UserError("no kernels")

    monkeypatch.setattr(native, "require", require)
    with pytest.raises(UserError, match="no kernels"):
        command.run(None)
