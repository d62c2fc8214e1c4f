import argparse
import json
from pathlib import Path

import pytest

from sparse_backend.bench import paths as command
from sparse_backend.errors import UserError
from sparse_backend.ffn import paths


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--d-model", "64", "--d-ff", "128", "--dtype", "float32", *flags])


def test_measures_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "_CPU_BUDGET_S", 0.2)
    assert command.run(arguments("--json")) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["density"] for entry in listed] == list(paths.DENSITIES)
    limits = [entry["max_sparse_rows"] for entry in listed]
    assert limits == sorted(limits, reverse=True)
    assert set(limits) <= {0, *paths.ROWS}
    timed = [timing for entry in listed for timing in entry["timings"]]
    assert timed[0]["rows"] >= 1
    assert all(timing["sparse_us"] > 0 and timing["dense_us"] > 0 for timing in timed)
    assert command.run(arguments()) == 0
    assert "density" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--d-model", "60"], "--d-model is 60"),
        (["--d-ff", "0"], "--d-ff is 0"),
        (["--dtype", "float16"], "--dtype float16 needs a GPU"),
    ],
)
def test_refuses_what_the_op_does_not_take(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        command.run(arguments(*flags))


def test_refuses_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        command.run(arguments("--device", "cuda"))


def test_says_where_there_are_no_sparse_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "largest_sparse_rows", lambda *_: 0)
    with pytest.raises(UserError, match="no sparse kernels for --dtype float32"):
        command.run(arguments())
