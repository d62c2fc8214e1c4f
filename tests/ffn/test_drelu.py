"""dReLU: a neuron is active where its gate and its up value are above the threshold."""

import pytest
import torch

from sparse_backend.ffn import counters, gated_activation, native, op, reference
from sparse_backend.ffn.counters import ACTIVE, DENSE, FIRST, ROWS, SECOND, SPARSE, STEPS, UNION, VIEWS
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE, DTYPES, Case, assert_within_twice

both_paths = pytest.mark.parametrize("path", [ALL_SPARSE, ALL_DENSE], ids=["sparse", "dense"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OUTPUTS = 2048


def cases(rows: int, d_model: int, d_ff: int, dtype: torch.dtype, density: float, threshold: float = 0.0) -> list[Case]:
    seeds = range(-(-OUTPUTS // (rows * d_model)))
    return [
        Case.random(rows, d_model, d_ff, dtype, density=density, threshold=threshold, seed=s, drelu=True) for s in seeds
    ]


@both_dtypes
def test_exactness_of_the_sparse_path(isa: str, dtype: torch.dtype) -> None:
    for rows in (1, 2, 5, 16, 33):
        for density in (0.05, 0.4):
            assert_within_twice(cases(rows, 520, 1000, dtype, density), ALL_SPARSE)


@both_paths
@both_dtypes
def test_exactness_of_narrow_layers(dtype: torch.dtype, path: int) -> None:
    for rows, density in ((1, 1.0), (3, 0.1), (70, 0.0), (70, 0.3)):
        assert_within_twice(cases(rows, 40, 264, dtype, density, threshold=0.1), path)


@both_paths
@both_dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 70])
def test_counters_equal_a_plain_count_of_the_same_values(isa: str, dtype: torch.dtype, path: int, rows: int) -> None:
    for density, view, threshold in [(0.0, None, 0.5), (0.1, 0.2, 0.0), (0.1, 0.9, 0.7), (1.0, None, 0.0)]:
        case = Case.random(rows, 136, 264, dtype, density=density, view=view, threshold=threshold, drelu=True)
        expected = counters.new_counters(drelu=True)
        reference.count(expected, SPARSE if path == ALL_SPARSE else DENSE, case.active(path))
        if path == ALL_DENSE:
            reference.count_views(expected, case.views(path))
        assert torch.equal(case.run(path)[1], expected)


@both_paths
@both_dtypes
def test_gate_and_up_may_change_places(isa: str, dtype: torch.dtype, path: int) -> None:
    case = Case.random(6, 136, 264, dtype, density=0.1, view=0.2, drelu=True)
    exchanged = case.exchanged()
    y, counted = case.run(path)
    other_y, other_counted = exchanged.run(path)
    torch.testing.assert_close(other_y, y, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(other_counted[:VIEWS], counted[:VIEWS])
    assert torch.equal(other_counted[VIEWS, [FIRST, SECOND]], counted[VIEWS, [SECOND, FIRST]])


def test_the_dense_path_counts_each_view_by_itself() -> None:
    case = Case.random(400, 64, 128, torch.float32, density=0.1, view=0.2, drelu=True)
    views = case.run(ALL_DENSE)[1][VIEWS]
    assert views[ROWS] == 400
    assert views[FIRST].item() / (400 * 128) == pytest.approx(0.2, abs=0.03)
    assert views[SECOND].item() / (400 * 128) == pytest.approx(0.5, abs=0.03)
    assert not case.run(ALL_SPARSE)[1][VIEWS].any()


def test_union_spans_all_rows_of_a_call(isa: str) -> None:
    """Every gate is above the threshold, and each up value in exactly one of 64 rows."""
    identity = torch.eye(64)
    gate_up = torch.cat([torch.ones(64, 64), 2 * identity - 1])
    for rows in (1, 2, 4, 5, 32, 64):
        y, counted = Case(identity[:rows], gate_up, 3 * identity, 0.0, drelu=True).run(ALL_SPARSE)
        assert counted[SPARSE].tolist() == [rows, rows, rows, 1]
        assert torch.equal(y, 3 * identity[:rows])


@both_paths
@both_dtypes
def test_values_on_the_threshold_are_inactive(isa: str, dtype: torch.dtype, path: int) -> None:
    for gate, up, active in [(0.5, 1, 0), (1, 0.5, 0), (1, 1, 16), (-1, -1, 0), (float("nan"), 1, 16)]:
        x = torch.zeros(1, 64, dtype=dtype)
        x[:, 3], x[:, 4] = 1, 0
        gate_up = torch.zeros(32, 64, dtype=dtype)
        gate_up[:16, 3], gate_up[16:, 3] = gate, up
        y, counted = Case(x, gate_up, torch.ones(16, 64, dtype=dtype), 0.5, drelu=True).run(path)
        assert counted[:VIEWS, ACTIVE].sum() == active
        assert bool((y != 0).all()) is (active > 0)


@both_paths
@both_dtypes
def test_an_inactive_neuron_adds_nothing_even_with_an_infinite_value(isa: str, dtype: torch.dtype, path: int) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[1, 7] = float("inf")
    gate_up = torch.ones(32, 64, dtype=dtype)
    gate_up[16:] = -1
    y, counted = Case(x, gate_up, torch.ones(16, 64, dtype=dtype), 0.0, drelu=True).run(path)
    assert torch.equal(y, torch.zeros(2, 64, dtype=dtype))
    assert counted[:VIEWS, UNION].sum() == 0


@both_paths
@both_dtypes
@pytest.mark.parametrize("padded", [[0], [2, 3, 6], [0, 1, 2, 3, 4, 5, 6]], ids=["one", "three", "all"])
def test_rows_of_padding_are_left_out(isa: str, dtype: torch.dtype, path: int, padded: list[int]) -> None:
    case = Case.random(7, 72, 136, dtype, density=0.5, drelu=True)
    is_padding = torch.zeros(7, dtype=torch.bool)
    is_padding[padded] = True
    expected, expected_counts = Case(case.x[~is_padding], case.gate_up, case.down_t, case.threshold, drelu=True).run(
        path
    )
    case.x[is_padding] = float("nan")
    y, counted = case.run(path, is_padding)
    assert torch.equal(y[~is_padding], expected)
    assert not y[is_padding].any()
    assert torch.equal(counted, expected_counts)


def test_references_agree_with_relu_times_relu() -> None:
    case = Case.random(5, 64, 128, torch.float32, density=0.3, drelu=True)
    gate, up = (case.x @ case.gate_up.t()).chunk(2, dim=1)
    expected = (gate.relu() * up.relu()) @ case.down_t
    for ffn in (reference.sparse_gated_ffn, reference.dense_gated_ffn):
        y = ffn(case.x, case.gate_up, case.down_t, 0.0, counters.new_counters(drelu=True), drelu=True)
        torch.testing.assert_close(y, expected)


# ---- the activation by itself ------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("drelu", [False, True], ids=["one side", "drelu"])
@pytest.mark.parametrize("padded", [[], [1, 2], [0, 1, 2, 3, 4]], ids=["none", "two", "all"])
def test_the_activation_by_itself_is_the_middle_of_the_dense_path(
    isa: str, dtype: torch.dtype, drelu: bool, padded: list[int]
) -> None:
    case = Case.random(5, 72, 136, dtype, density=0.3, threshold=0.2, drelu=drelu)
    is_padding = None
    if padded:
        is_padding = torch.zeros(5, dtype=torch.bool)
        is_padding[padded] = True
    gate_up_out = case.x @ case.gate_up.t()
    counted, expected_counts = (counters.new_counters(drelu=drelu) for _ in range(2))
    h = gated_activation(gate_up_out, 0.2, counted, is_padding, drelu)
    expected = reference.gated_activation(gate_up_out, 0.2, expected_counts, is_padding, drelu)
    assert torch.equal(h, expected)
    assert torch.equal(counted, expected_counts)


@both_paths
def test_opcheck(path: int) -> None:
    case = Case.random(3, 64, 128, torch.float32, drelu=True)
    counted = counters.new_counters(drelu=True)
    arguments = (case.x, case.gate_up, case.down_t, 0.0, counted, path, torch.tensor([False, True, False]), True)
    torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, arguments)
    torch.library.opcheck(
        torch.ops.prosparse.gated_activation.default, (case.x @ case.gate_up.t(), 0.0, counted, None, True)
    )


@pytest.mark.parametrize(
    ("drelu", "shape", "message"),
    [
        (True, (2, 4), r"counters must be a contiguous int64 tensor of shape \[3, 4\]"),
        (False, (3, 4), r"shape \[2, 4\]"),
    ],
)
def test_counters_of_the_other_activation_are_refused(drelu: bool, shape: tuple[int, int], message: str) -> None:
    case = Case.random(3, 64, 128, torch.float32)
    counted = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=message):
        op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, 0.0, counted, 3, None, drelu)
    with pytest.raises(RuntimeError, match=message):
        op.check_arguments(case.x, case.gate_up, case.down_t, 0.0, counted, None, drelu)
    with pytest.raises(RuntimeError, match=message):
        gated_activation(case.x @ case.gate_up.t(), 0.0, counted, None, drelu)


def test_kernels_are_native_here() -> None:
    assert native.kernel_info().name == "cpu"
    assert Case.random(1, 64, 128, torch.float32, drelu=True).run(ALL_SPARSE)[1][SPARSE, STEPS] == 1
