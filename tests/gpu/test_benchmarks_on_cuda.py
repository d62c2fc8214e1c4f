"""The benchmarks' own machinery on a GPU: what is timed, and that the commands run."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_backend.bench import ffn, machine
from sparse_backend.bench import paths as paths_command
from sparse_backend.ffn import native, paths, timing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the measured tables only: a kernel build in it would take minutes.
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path)


def test_a_replay_repeats_the_calls_on_what_is_there_now() -> None:
    x = torch.ones(1000, device="cuda")
    recording = timing.record([lambda: x + 1, lambda: x * 3])
    x.fill_(5)
    for output in recording.outputs:
        output.fill_(torch.nan)
    recording.graph.replay()
    assert [output.unique().tolist() for output in recording.outputs] == [[6], [15]]


def test_times_are_those_of_the_work() -> None:
    values = torch.randn(2**27, device="cuda")
    calls: list[Callable[[], torch.Tensor]] = [values.sum] * 4
    graphs = {"once": timing.record(calls).graph, "thrice": timing.record(calls * 3).graph}
    medians = timing.medians_us(graphs, seconds=0.2, replays=(5, 20))
    assert medians["thrice"] == pytest.approx(3 * medians["once"], rel=0.1)
    # 2 GiB at the rate that is measured another way.
    assert medians["once"] * 1e-6 == pytest.approx(2**31 / machine.read_rate(torch.device("cuda")), rel=0.25)


def test_limits_are_measured_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    paths_command.add_arguments(parser)
    arguments = parser.parse_args(["--device", "cuda", "--d-model", "1536", "--d-ff", "3840", "--json"])
    assert paths_command.run(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert paths_command.run(arguments) == 0
    assert json.loads(capsys.readouterr().out) == first
    most = native.max_rows(torch.bfloat16, 1536)
    limits = [entry["max_sparse_rows"] for entry in first]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] <= most
    assert all(timing_["rows"] <= most for entry in first for timing_ in entry["timings"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_layer_is_measured(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    ffn.add_arguments(parser)
    flags = ["--device", "cuda", "--d-model", "1536", "--d-ff", "3840", "--rows", "1,64", "--density", "0.1"]
    assert ffn.run(parser.parse_args([*flags, "--dtype", dtype, "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    one, many = report["results"]
    assert report["machine"]["device"] == "cuda"
    assert one["density"] == pytest.approx(0.1, abs=0.02)
    assert one["bytes_per_s"] < 1.1 * report["machine"]["read_bytes_per_s"]
    assert many["path"] == "dense"
    if dtype == "float32":
        assert one["path"] == "dense"
        assert one["sparse_us"] is None
