"""The counters on a GPU: a plain count of the gate values compared, whose sides of the threshold float64 confirms."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_backend.ffn import counters, gated_activation, native, op, reference
from sparse_backend.ffn.counters import ROWS, SPARSE, STEPS, UNION
from sparse_backend.vllm_plugin import device_clock
from sparse_backend.vllm_plugin.step_records import StepRecordReader, StepRecordWriter
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE, Case
from tests.gpu.device import NEEDS_GPU, both_dtypes, both_paths, index_of, padding

pytestmark = NEEDS_GPU


def plain_count(case: Case, path: int, is_padding: torch.Tensor | None = None) -> torch.Tensor:
    expected = counters.new_counters("cuda", drelu=case.drelu)
    took_sparse = path == ALL_SPARSE and case.x.shape[0] <= native.max_rows(case.x.dtype, case.x.shape[1])
    reference.count(expected, index_of(ALL_SPARSE if took_sparse else ALL_DENSE), case.active(path), is_padding)
    if case.drelu and not took_sparse:
        reference.count_views(expected, case.views(path), is_padding)
    return expected


@both_dtypes
@both_paths
@pytest.mark.parametrize("shape", [(8, 8), (136, 264), (4096, 11008)], ids=str)
def test_counters_equal_a_plain_count_of_the_same_gates(shape: tuple[int, int], path: int, dtype: torch.dtype) -> None:
    for density, threshold in [(0.0, 0.5), (0.107, 0.0), (0.3, 0.7), (1.0, 0.0)]:
        case = Case.random(300, *shape, dtype, density=density, threshold=threshold, device="cuda")
        for rows in (*range(1, 34), 63, 64, 65, 255, 300):
            some = case.first_rows(rows)
            assert torch.equal(some.run(path)[1], plain_count(some, path)), (rows, density)


@both_dtypes
@both_paths
@pytest.mark.parametrize("shape", [(8, 8), (136, 264), (4096, 14336)], ids=str)
def test_drelu_counts_neurons_active_on_both_sides(shape: tuple[int, int], path: int, dtype: torch.dtype) -> None:
    for density, view, threshold in [(0.0, 0.5, 0.5), (0.05, 0.1, 0.0), (0.3, 0.9, 0.7), (1.0, None, 0.0)]:
        case = Case.random(
            300, *shape, dtype, density=density, view=view, threshold=threshold, device="cuda", drelu=True
        )
        for rows in (*range(1, 34), 64, 300):
            some = case.first_rows(rows)
            assert torch.equal(some.run(path)[1], plain_count(some, path)), (rows, density)


@both_dtypes
@both_paths
@pytest.mark.parametrize("rows", [1, 7, 16, 300])
def test_drelu_leaves_rows_of_padding_out(rows: int, path: int, dtype: torch.dtype) -> None:
    case = Case.random(rows, 136, 1000, dtype, density=0.05, device="cuda", drelu=True)
    for padded in ([], [0], list(range(0, rows, 3)), list(range(rows))):
        is_padding = padding(rows, padded)
        y, counted = case.run(path, is_padding)
        assert torch.equal(counted, plain_count(case, path, is_padding))
        assert not y[is_padding].any()


@both_dtypes
@both_paths
@pytest.mark.parametrize("rows", [1, 7, 16, 33])
def test_drelu_in_a_graph_gives_the_same_bits_and_counts_each_time(rows: int, path: int, dtype: torch.dtype) -> None:
    case = Case.random(rows, 4096, 14336, dtype, density=0.1, device="cuda", drelu=True)
    expected, once = case.run(path)
    counted = counters.new_counters("cuda", drelu=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, 0.0, counted, path, None, True)
    counted.zero_()
    for repeats in range(1, 51):
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(counted, repeats * once)


@both_dtypes
@pytest.mark.parametrize("drelu", [False, True], ids=["one side", "drelu"])
def test_the_activation_by_itself(drelu: bool, dtype: torch.dtype) -> None:
    for rows in (1, 7, 33, 300):
        case = Case.random(rows, 136, 1000, dtype, density=0.3, threshold=0.2, device="cuda", drelu=drelu)
        gate_up_out = case.x @ case.gate_up.t()
        for is_padding in (None, padding(rows, list(range(0, rows, 2)))):
            counted, expected_counts = (counters.new_counters("cuda", drelu=drelu) for _ in range(2))
            h = gated_activation(gate_up_out, 0.2, counted, is_padding, drelu)
            assert torch.equal(h, reference.gated_activation(gate_up_out, 0.2, expected_counts, is_padding, drelu))
            assert torch.equal(counted, expected_counts)


@both_dtypes
@both_paths
@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def test_float64_agrees_but_within_rounding_of_the_threshold(
    rows: int, path: int, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case.random(rows, 4096, 11008, dtype, density=0.107, threshold=0.25, device="cuda")
    gate_weights = case.gate_up[:11008].double()
    exact = case.x.double() @ gate_weights.t()
    # Higham 2002, eq. 3.5, the error bound of any order of summation; the dense path also rounds to the dtype.
    bound = 4096 * torch.finfo(torch.float32).eps * (case.x.double().abs() @ gate_weights.abs().t())
    if path == ALL_DENSE or rows > native.max_rows(dtype, 4096):
        bound += torch.finfo(dtype).eps * exact.abs()
    differs = case.active(path) != (exact > 0.25)
    with capsys.disabled():
        print(
            f"\n{int(differs.sum())} of {differs.numel()} gate values fall on the other side of the threshold than in float64"
        )
    assert torch.all((exact - 0.25).abs()[differs] <= bound[differs])
    counted = case.run(path)[1].sum(dim=0)
    expected = counters.new_counters("cuda")
    reference.count(expected, SPARSE, exact > 0.25)
    assert torch.all((counted - expected[SPARSE]).abs() <= differs.sum())
    assert counted[[ROWS, STEPS]].tolist() == [rows, 1]


@both_dtypes
@pytest.mark.parametrize("shape", [(24, 40), (520, 1000), (4096, 11008)], ids=str)
def test_gate_values_are_the_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    d_model, d_ff = shape
    case = Case.random(native.max_rows(dtype, d_model), d_model, d_ff, dtype, device="cuda")
    gate_weights = case.gate_up[:d_ff].double()
    for rows in range(1, case.x.shape[0] + 1):
        x = case.x[:rows]
        values = op.gate_values(x, case.gate_up, ALL_SPARSE)
        assert values.dtype == torch.float32
        exact, magnitude = x.double() @ gate_weights.t(), x.double().abs() @ gate_weights.abs().t()
        # Higham 2002, eq. 3.5.
        assert torch.all((values.double() - exact).abs() <= d_model * torch.finfo(torch.float32).eps * magnitude)


def test_counters_are_cumulative_and_per_path() -> None:
    case = Case.random(4, 64, 128, torch.bfloat16, device="cuda")
    counted = counters.new_counters("cuda")
    for limit in (ALL_SPARSE, ALL_SPARSE, 3):
        op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, case.threshold, counted, limit)
    expected = 2 * case.run(ALL_SPARSE)[1] + case.run(3)[1]
    assert torch.equal(counted, expected)
    assert counted[:, STEPS].tolist() == [2, 1]


@both_paths
def test_counts_beyond_32_bits(path: int) -> None:
    case = Case.random(8, 64, 128, torch.bfloat16, density=1, device="cuda")
    counted = torch.full((2, 4), 2**40 - 1, dtype=torch.int64, device="cuda")
    op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, case.threshold, counted, path)
    added = counted - (2**40 - 1)
    assert added[index_of(path)].tolist() == [8, 8 * 128, 128, 1]
    assert added.sum() == 8 + 8 * 128 + 128 + 1


@both_dtypes
@both_paths
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 300])
def test_rows_of_padding_are_not_counted(rows: int, path: int, dtype: torch.dtype) -> None:
    case = Case.random(rows, 136, 1000, dtype, density=0.05, device="cuda")
    for padded in ([], [0], [rows - 1], list(range(0, rows, 3)), list(range(rows // 2, rows)), list(range(rows))):
        is_padding = padding(rows, padded)
        counted = case.run(path, is_padding)[1]
        assert torch.equal(counted, plain_count(case, path, is_padding))
        real = rows - len(set(padded))
        assert counted[:, ROWS].sum() == real
        assert counted[:, STEPS].sum() == min(real, 1)


@both_dtypes
@both_paths
@pytest.mark.parametrize("drelu", [False, True], ids=["relu", "drelu"])
@pytest.mark.parametrize("shape", [(8, 8), (136, 264), (520, 1000), (4096, 11008)], ids=str)
def test_each_row_is_counted_and_nothing_else_changes(
    shape: tuple[int, int], path: int, dtype: torch.dtype, drelu: bool
) -> None:
    for density in (0.0, 0.107, 1.0):
        case = Case.random(2100, *shape, dtype, density=density, threshold=0.3, device="cuda", drelu=drelu)
        for rows in (*range(1, 35), 64, 255, 300, 2100):
            some = case.first_rows(rows)
            of_row = some.active(path).sum(dim=1)
            row_active = torch.arange(rows + 2, dtype=torch.int32, device="cuda")
            y, counted = some.run_row_active(path, row_active)
            assert torch.equal(row_active[:rows], torch.arange(rows, device="cuda") + of_row), (rows, density)
            assert row_active[rows:].tolist() == [rows, rows + 1]
            without = some.run(path)
            assert torch.equal(y, without[0])
            assert torch.equal(counted, without[1])


@both_paths
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 300])
def test_rows_of_padding_add_nothing_to_their_place(rows: int, path: int) -> None:
    case = Case.random(rows, 136, 1000, torch.bfloat16, density=0.2, device="cuda")
    of_row = reference.active_neurons(case.gates(path), case.threshold).sum(dim=1)
    for padded in ([], [0], [rows - 1], list(range(0, rows, 3)), list(range(rows))):
        is_padding = padding(rows, padded)
        row_active = torch.zeros(rows, dtype=torch.int32, device="cuda")
        case.run_row_active(path, row_active, is_padding)
        assert torch.equal(row_active, of_row.masked_fill(is_padding, 0).int())


@pytest.fixture
def shared_file() -> Iterator[Path]:
    file = Path("/dev/shm") / f"prosparse-test-{os.getpid()}"
    yield file
    file.unlink(missing_ok=True)


def test_row_counts_of_a_replayed_graph_reach_shared_memory(shared_file: Path) -> None:
    case = Case.random(5, 136, 264, torch.bfloat16, device="cuda")
    counted = counters.new_counters("cuda")
    row_active = torch.zeros(16, dtype=torch.int32, device="cuda")
    arguments = (case.x, case.gate_up, case.down_t, case.threshold, counted, ALL_SPARSE, None, False, row_active)
    op.sparse_gated_ffn(*arguments)
    facts = {"neurons": 264, "max_sparse_rows": [16], "sparse_us": [], "dense_us": []}
    writer = StepRecordWriter(shared_file, counted, row_active, facts)
    reader = StepRecordReader(shared_file)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.sparse_gated_ffn(*arguments)
    counted.zero_()
    writer.reset()
    of_row = reference.active_neurons(case.gates(ALL_SPARSE), case.threshold).sum(dim=1).tolist()
    ended_at = []
    began = time.perf_counter_ns()
    for _ in range(20):
        graph.replay()
        writer.publish()
        torch.cuda.synchronize()
        step = reader.next_step(5)
        assert step.active.tolist() == of_row
        ended_at.append(step.ended_at)
    took = time.perf_counter_ns() - began
    assert ended_at == sorted(ended_at)
    assert 0 < ended_at[-1] - ended_at[0] < took


def test_the_devices_clock_is_read_between_its_kernels() -> None:
    readings = torch.zeros(3, dtype=torch.int64, device="cuda")
    start, middle, end = readings.split(1)
    device_clock.read(start)  # compiled
    torch.cuda.synchronize()
    began = time.perf_counter_ns()
    device_clock.read(start)
    torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
    device_clock.read(middle)
    device_clock.read(end)
    torch.cuda.synchronize()
    took = time.perf_counter_ns() - began
    assert 20_000_000 < int(middle - start) < took
    assert 0 <= int(end - middle) < 1_000_000


@both_paths
def test_a_nan_row_activates_every_neuron(path: int) -> None:
    case = Case.random(5, 136, 264, torch.bfloat16, density=0.1, device="cuda")
    case.x[2, 7] = float("nan")
    assert case.run(path)[1][index_of(path), UNION] == 264
