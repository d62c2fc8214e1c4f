import argparse
import json

import pytest
import torch

from sparse_backend.bench import ffn
from sparse_backend.errors import UserError
from sparse_backend.ffn import paths
from sparse_backend.ffn.paths import PathTable
from tests.ffn.layers import ALL_SPARSE, Case


@pytest.fixture(autouse=True)
def sparse_up_to_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PathTable(limits={1.0: 2}, timings={})
    monkeypatch.setattr(paths, "path_table", lambda *_: table)
    monkeypatch.setattr(ffn, "_MAX_LAYERS", 3)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ffn.add_arguments(parser)
    return parser.parse_args(["--d-model", "64", "--d-ff", "512", *flags])


def test_json_has_an_object_per_row_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert ffn.run(parse("--rows", "1,2,4", "--density", "0.2", "--dtype", "float32", "--json")) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["rows"] for result in results] == [1, 2, 4]
    assert [result["path"] for result in results] == ["sparse", "sparse", "dense"]
    for result in results:
        assert set(result) == set(ffn.FfnResult.__annotations__)
        assert result["density"] == pytest.approx(0.2, abs=0.05)
        assert result["density"] <= result["union"] <= 1
        assert result["speedup"] == pytest.approx(result["dense_ms"] / result["auto_ms"], rel=0.05)


def test_table_names_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert ffn.run(parse("--rows", "1")) == 0
    assert "threads" in capsys.readouterr().out


def test_density_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"--density is 1\.5"):
        ffn.run(parse("--density", "1.5"))


def test_rival_computes_the_same() -> None:
    case = Case.random(3, 64, 128, torch.float32, threshold=0.2)
    y, _ = case.run(ALL_SPARSE)
    rival = ffn.torch_dense_ffn(case.x, case.gate_up, case.down_t.t().contiguous(), 0.2)
    torch.testing.assert_close(rival, y, rtol=1e-4, atol=1e-5)
