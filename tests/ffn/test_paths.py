import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparse_backend.errors import UserError
from sparse_backend.ffn import paths
from sparse_backend.ffn.paths import PathTable, Timing


def timings(*ratios: float, rows: tuple[int, ...] = paths.ROWS) -> list[Timing]:
    """Timings at which the sparse path takes these shares of the dense path's time."""
    return [Timing(rows=n, sparse_ms=ratio, dense_ms=1.0) for n, ratio in zip(rows, ratios, strict=False)]


@pytest.mark.parametrize(
    ("ratios", "limit"),
    [
        ((0.5, 0.6, 0.8, 1.1, 1.5), 3),
        ((1.1, 1.2), 0),
        ((0.9, 0.9), 2),
        ((), 0),
        # A tie is no gain.
        ((0.9, 0.99, 0.98), 1),
        # One bad reading among good ones, one good among bad ones.
        ((0.4, 1.05, 0.7, 1.3), 3),
        ((0.9, 1.3, 0.95, 1.3), 1),
    ],
)
def test_best_limit(ratios: tuple[float, ...], limit: int) -> None:
    assert paths.best_limit(timings(*ratios)) == limit


def test_a_denser_measurement_is_where_the_limit_starts() -> None:
    above_8 = tuple(rows for rows in paths.ROWS if rows > 8)
    assert paths.best_limit(timings(1.2, 1.5, rows=above_8), 8) == 8
    assert paths.best_limit(timings(0.9, 1.5, rows=above_8), 8) == 12


def test_the_next_measured_density_at_or_above_counts() -> None:
    table = PathTable(limits={1.0: 1, 0.5: 2, 0.1: 3}, timings={})
    assert [table.max_sparse_rows(density) for density in (0.0, 0.1, 0.11, 0.5, 0.7, 1.0)] == [3, 3, 2, 2, 1, 1]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """An empty cache, and a list of the shapes that are measured, in place of measuring."""
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path))
    calls: list[tuple[int, int]] = []

    def measure(_dtype: torch.dtype, d_model: int, d_ff: int) -> PathTable:
        calls.append((d_model, d_ff))
        return PathTable(limits={1.0: len(calls)}, timings={1.0: timings(0.5)})

    monkeypatch.setattr(paths, "_measure", measure)
    return calls


def test_measured_once_and_kept(measured: list[tuple[int, int]]) -> None:
    first = paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1)
    assert paths.max_sparse_rows(torch.bfloat16, 64, 128, None) == first == 1
    assert paths.max_sparse_rows(torch.float32, 64, 128, 0.1) == 2
    assert paths.max_sparse_rows(torch.bfloat16, 64, 256, 0.1) == 3
    assert measured == [(64, 128), (64, 128), (64, 256)]


def test_a_number_of_threads_has_its_own_table(measured: list[tuple[int, int]], threads: None) -> None:
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1)
    assert len(measured) == 2


def test_remeasuring_replaces(measured: list[tuple[int, int]]) -> None:
    paths.path_table(torch.bfloat16, 64, 128)
    paths.path_table(torch.bfloat16, 64, 128, remeasure=True)
    assert paths.path_table(torch.bfloat16, 64, 128).limits[1.0] == len(measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda _: "",
        lambda text: text.replace("sparse_ms", "speed"),
    ],
    ids=["cut off", "another document", "empty", "another schema"],
)
def test_a_damaged_file_is_measured_anew(
    measured: list[tuple[int, int]], tmp_path: Path, damage: Callable[[str], str]
) -> None:
    paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1)
    [file] = tmp_path.glob("paths/*.json")
    file.write_text(damage(file.read_text()))
    assert paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1) == 2
    assert paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1) == 2
    assert [entry.name for entry in (tmp_path / "paths").iterdir() if entry.name != "lock"] == [file.name]


def test_callers_at_once_measure_once(measured: list[tuple[int, int]]) -> None:
    with ThreadPoolExecutor(4) as pool:
        limits = list(pool.map(lambda _: paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1), range(4)))
    assert limits == [1] * 4
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    measured: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path / "file"))
    assert paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1) == 1
    assert "cannot be kept" in caplog.text


def arguments(d_model: int = 64, d_ff: int = 128, *, json: bool = False) -> argparse.Namespace:
    return argparse.Namespace(d_model=d_model, d_ff=d_ff, dtype="float32", json=json, remeasure=False)


def test_command_measures_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "_BUDGET_S", 0.2)
    assert paths.run(arguments(json=True)) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["density"] for entry in listed] == list(paths.DENSITIES)
    limits = [entry["max_sparse_rows"] for entry in listed]
    assert limits == sorted(limits, reverse=True)
    assert set(limits) <= {0, *paths.ROWS}
    timed = [timing for entry in listed for timing in entry["timings"]]
    assert timed[0]["rows"] >= 1
    assert all(timing["sparse_ms"] > 0 and timing["dense_ms"] > 0 for timing in timed)
    assert paths.run(arguments()) == 0
    assert "density" in capsys.readouterr().out


@pytest.mark.parametrize(("d_model", "d_ff", "flag"), [(60, 128, "--d-model is 60"), (64, 0, "--d-ff is 0")])
def test_command_refuses_shapes_the_op_does_not_take(d_model: int, d_ff: int, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        paths.run(arguments(d_model, d_ff))
