import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparse_backend.ffn import native, paths
from sparse_backend.ffn.paths import PathTable, Timing


def timings(*ratios: float, rows: tuple[int, ...] = paths.ROWS) -> list[Timing]:
    """Timings at which the sparse path takes these shares of the dense path's time."""
    return [Timing(rows=n, sparse_us=ratio, dense_us=1.0) for n, ratio in zip(rows, ratios, strict=False)]


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


def test_no_density_stands_for_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PathTable(limits={0.05: 8, 0.11: 4, 1.0: 1}, timings={})
    monkeypatch.setattr(paths, "path_table", lambda *_: table)
    assert paths.max_sparse_rows(torch.bfloat16, 64, 128, None) == 4


def test_nothing_but_torch_is_needed() -> None:
    code = "import sys, sparse_backend.ffn.paths; print(*{'pydantic', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


class TestOnAGpu:
    """What a GPU changes, with the GPU itself replaced."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        info = native.KernelInfo("cuda", "sm_90", "")
        monkeypatch.setattr(native, "load", lambda _="cpu": True)
        monkeypatch.setattr(native, "kernel_info", lambda _="cpu": info)
        monkeypatch.setattr(native, "library_key", lambda device_type="cpu": f"build-for-{device_type}")
        monkeypatch.setattr(native, "max_rows", lambda dtype, _: 0 if dtype == torch.float32 else 12)
        monkeypatch.setattr(paths, "processor_name", lambda device_type: f"some {device_type}")

    def test_a_dtype_without_kernels_is_not_measured(self, measured: list[tuple[int, int]]) -> None:
        assert paths.max_sparse_rows(torch.float32, 64, 128, 0.1, "cuda") == paths.ALWAYS_DENSE
        assert measured == []

    def test_cpu_and_gpu_have_tables_of_their_own(self, measured: list[tuple[int, int]], tmp_path: Path) -> None:
        for device_type in ("cpu", "cuda", "cpu", "cuda"):
            paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1, device_type)
        assert len(measured) == 2
        assert len(list(tmp_path.glob("paths/build-for-cuda-*.json"))) == 1

    def test_threads_do_not_matter(self, measured: list[tuple[int, int]], threads: None) -> None:
        for number in (1, 2):
            torch.set_num_threads(number)
            paths.max_sparse_rows(torch.bfloat16, 64, 128, 0.1, "cuda")
        assert len(measured) == 1

    def test_no_more_rows_are_measured_than_the_kernels_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []

        def meter(x: torch.Tensor, _deadline: float) -> Timing:
            asked.append(x.shape[0])
            return Timing(x.shape[0], 0.5, 1.0)

        monkeypatch.setattr(paths, "_cpu_meter", lambda _: meter)
        monkeypatch.setattr(paths, "largest_sparse_rows", lambda *_: 12)
        table = paths._measure(torch.float32, 16, 32, "cpu")
        assert asked == [1, 2, 3, 4, 6, 8, 12]
        assert set(table.limits.values()) == {12}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """An empty cache, and a list of the shapes that are measured, in place of measuring."""
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path))
    calls: list[tuple[int, int]] = []

    def measure(_dtype: torch.dtype, d_model: int, d_ff: int, _device_type: str) -> PathTable:
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
        lambda text: text.replace("sparse_us", "speed"),
        lambda text: text.replace('"limits"', '"bounds"'),
        lambda _: '{"tables": []}',
    ],
    ids=["cut off", "another document", "empty", "another field", "another schema", "a list"],
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
