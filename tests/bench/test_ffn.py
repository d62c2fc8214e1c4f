import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_backend.bench import ffn, machine
from sparse_backend.errors import UserError
from sparse_backend.ffn import paths
from sparse_backend.ffn.paths import PathTable
from tests.ffn.layers import ALL_SPARSE, Case


@pytest.fixture(autouse=True)
def sparse_up_to_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PathTable(limits={1.0: 2}, timings={})
    monkeypatch.setattr(paths, "path_table", lambda *_: table)
    monkeypatch.setattr(ffn, "_CPU_LAYERS", 3)
    monkeypatch.setattr(machine, "_READ_BYTES", {"cpu": 2**22})


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    ffn.add_arguments(parser)
    return parser.parse_args(["--d-model", "64", "--d-ff", "512", *flags])


def measure(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert ffn.run(parse("--dtype", "float32", "--json", *flags)) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_an_object_per_row_count(capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(capsys, "--rows", "1,2,4", "--density", "0.2")
    assert set(report) == set(ffn.FfnReport.__annotations__)
    assert set(report["machine"]) == set(machine.Machine.__annotations__)
    assert report["machine"]["device"] == "cpu"
    assert report["machine"]["read_bytes_per_s"] > 1e8
    results = report["results"]
    assert [result["rows"] for result in results] == [1, 2, 4]
    assert [result["path"] for result in results] == ["sparse", "sparse", "dense"]
    for result in results:
        assert set(result) == set(ffn.FfnResult.__annotations__)
        assert result["wanted_density"] == 0.2
        assert result["density"] == pytest.approx(0.2, abs=0.05)
        assert result["density"] <= result["union"] <= 1
        assert result["speedup"] == pytest.approx(result["dense_us"] / result["auto_us"], rel=0.05)
        weights = 3 * 64 * 512 * 4
        assert result["bytes"] == pytest.approx(weights * (1 + 2 * result["union"]) / 3, abs=64)
        assert result["bytes_per_s"] == pytest.approx(result["bytes"] / result["auto_us"] * 1e6, rel=0.01)
        assert result["rival_us"] is None


def test_every_shape_and_density_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(capsys, "--d-model", "64,32", "--d-ff", "512,256", "--density", "0.1,1", "--rows", "1")
    measured = [(result["d_model"], result["d_ff"], result["wanted_density"]) for result in report["results"]]
    assert measured == [(64, 512, 0.1), (64, 512, 1.0), (32, 256, 0.1), (32, 256, 1.0)]
    assert report["results"][1]["density"] == 1


def test_frequencies_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "frequency.npz"
    always_tenth = np.arange(1000) % 10 == 0
    np.savez(file, freq_all=np.stack([always_tenth, always_tenth]).astype(np.float16))
    report = measure(capsys, "--pattern", f"frequencies={file}", "--rows", "1,4")
    assert report["pattern"] == "frequencies=frequency.npz"
    for result in report["results"]:
        assert result["wanted_density"] is None
        # The same neurons for every row: rows share all of them.
        assert result["union"] == result["density"] == pytest.approx(0.1, abs=0.04)


def test_recorded_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "inputs.npy"
    # Row i has the neurons i, i + 8, …: rows share none.
    np.save(file, np.where(np.arange(512) % 8 == np.arange(8)[:, None], 0.5, 0).astype(np.float16))
    report = measure(capsys, "--pattern", f"recorded={file}", "--rows", "4,1,16")
    shares = [(result["rows"], result["density"], result["union"]) for result in report["results"]]
    assert shares == [(4, 0.125, 0.5), (1, 0.125, 0.125), (16, 0.125, 1.0)]


def test_table_names_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert ffn.run(parse("--rows", "1")) == 0
    assert "threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--d-model", "64,32"], "2 widths and --d-ff 1 numbers"),
        (["--d-ff", "60"], "--d-ff is 60"),
        (["--dtype", "float16"], "--dtype float16 needs a GPU"),
        (["--device", "cuda"], "no NVIDIA GPU"),
        (["--density", "0.1", "--pattern", "frequencies=f.npz"], "--density cannot be chosen"),
        (["--pattern", "frequencies=missing.npz"], "missing.npz cannot be read"),
        (["--pattern", "recorded=missing.npy", "--rows", "1"], "missing.npy cannot be read"),
        (["--pattern", "recorded=missing.npy", "--rows", "33"], "takes up to half of --d-model, 32"),
        (["--rival", "operators.so"], "--rival is for --device cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        ffn.run(parse(*flags))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "flags", [["--density", "1.5"], ["--density", "nan"], ["--pattern", "dense"], ["--pattern", "recorded="]]
)
def test_what_cannot_be_read_is_refused(flags: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(*flags)


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_a_wrong_result_is_not_timed(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ffn.torch_dense_ffn
    monkeypatch.setattr(ffn, "torch_dense_ffn", lambda *arguments: right(*arguments) * wrong)
    with pytest.raises(UserError, match=r"dense is wrong for 1 rows of 64 x 512"):
        ffn.run(parse("--rows", "1", "--json"))
    assert capsys.readouterr().out == ""


def test_rival_computes_the_same() -> None:
    case = Case.random(3, 64, 128, torch.float32, threshold=0.2)
    y, _ = case.run(ALL_SPARSE)
    rival = ffn.torch_dense_ffn(case.x, case.gate_up, case.down_t.t().contiguous(), 0.2)
    torch.testing.assert_close(rival, y, rtol=1e-4, atol=1e-5)
