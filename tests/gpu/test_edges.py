"""Edges on a GPU: gates on the threshold, inf and NaN, rows of padding, no rows, input that is refused."""

from collections.abc import Callable

import pytest
import torch

from sparse_backend.ffn import counters, op
from sparse_backend.ffn.counters import ACTIVE
from tests.ffn.layers import ALL_SPARSE, Case
from tests.gpu.device import NEEDS_GPU, both_dtypes, both_paths, index_of, padding

pytestmark = NEEDS_GPU

INF, NAN = float("inf"), float("nan")


# ---- gates on the threshold --------------------------------------------------------------------------------------------------


def next_up(value: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(INF, dtype=dtype)).item()


@both_paths
@both_dtypes
def test_gate_on_the_threshold(dtype: torch.dtype, path: int) -> None:
    """One column of x is 1, the others are 0: each gate value is the very weight, whatever the order of summation."""
    half, tiny = 0.5, torch.finfo(dtype).tiny
    expected_at: list[tuple[float, float, bool]] = [
        (half, half, False),
        (half, next_up(half, dtype), True),
        (half, -next_up(half, dtype), False),
        (0.0, 0.0, False),
        (0.0, -0.0, False),
        (0.0, tiny, True),
        (0.0, -tiny, False),
        # Half a unit beside what the dtype can hold: the comparison is in float32.
        (half + torch.finfo(dtype).eps / 8, half, False),
        (half + torch.finfo(dtype).eps / 8, next_up(half, dtype), True),
        # 0.01 is larger in either dtype than in float32.
        (0.01, torch.tensor(0.01, dtype=dtype).item(), True),
    ]
    for rows, d_model in [(1, 64), (5, 4096), (16, 520), (33, 64)]:
        for threshold, gate, active in expected_at:
            x = torch.zeros(rows, d_model, dtype=dtype, device="cuda")
            x[:, d_model // 2 + 3] = 1
            gate_up = torch.ones(2 * 16, d_model, dtype=dtype, device="cuda")
            gate_up[:16] = gate
            case = Case(x, gate_up, torch.ones(16, d_model, dtype=dtype, device="cuda"), threshold)
            y, counted = case.run(path)
            assert counted[:, ACTIVE].sum() == (16 * rows if active else 0), (rows, threshold, gate)
            assert torch.equal(y, torch.full_like(y, 16 * gate if active else 0)), (rows, threshold, gate)


# ---- inf and NaN -------------------------------------------------------------------------------------------------------------


def assert_same_pattern(y: torch.Tensor, expected: torch.Tensor) -> None:
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(y), pattern(expected))


@both_paths
@both_dtypes
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_rows_stay_to_themselves(value: float, dtype: torch.dtype, path: int) -> None:
    for rows, row, density in [(1, 0, 0.1), (5, 2, 0.0), (9, 8, 0.1), (16, 0, 0.5), (33, 32, 0.1), (70, 3, 0.1)]:
        case = Case.random(rows, 520, 264, dtype, density=density, device="cuda")
        case.x[row, 519] = value
        expected, active = case.dense()
        y, _ = case.run(path)
        assert_same_pattern(y, expected)
        if rows > 1:
            others = torch.arange(rows, device="cuda") != row
            finite = Case(case.x[others], case.gate_up, case.down_t, case.threshold)
            ours = finite.error(y[others], case.active(path)[others])
            assert ours <= 2 * finite.error(expected[others], active[others])


@both_paths
@both_dtypes
def test_infinity_through_active_neurons_is_no_nan(dtype: torch.dtype, path: int) -> None:
    x = torch.ones(2, 64, dtype=dtype, device="cuda")
    x[1, 7] = INF
    weights = torch.ones(2 * 16, 64, dtype=dtype, device="cuda") / 8
    y, _ = Case(x, weights, weights[:16] * 8, 0.0).run(path)
    assert torch.equal(y[0], torch.full_like(y[0], 8 * 8 * 16))
    assert torch.equal(y[1], torch.full_like(y[1], INF))


@both_paths
@both_dtypes
def test_infinity_beside_inactive_neurons_is_nan(dtype: torch.dtype, path: int) -> None:
    """The dense product multiplies their gate, 0, with an infinite up value: that they are skipped must not hide it."""
    for rows, active in [(1, 0), (3, 0), (3, 5), (16, 15)]:
        gate_up = torch.ones(2 * 16, 64, dtype=dtype, device="cuda")
        gate_up[active:16] = -1
        x = torch.ones(rows, 64, dtype=dtype, device="cuda")
        x[-1, 7] = INF
        case = Case(x, gate_up, torch.ones(16, 64, dtype=dtype, device="cuda"), 0.0)
        y, _ = case.run(path)
        assert y[-1].isnan().all()
        assert torch.equal(y[:-1], torch.full_like(y[:-1], 64 * 64 * active))


@both_paths
def test_overflow_as_dense_does(path: int) -> None:
    case = Case.random(9, 520, 1000, torch.bfloat16, device="cuda")
    case.x[4].mul_(1e25)
    expected, _ = case.dense()
    assert expected[4].isnan().all()
    assert_same_pattern(case.run(path)[0], expected)


# ---- rows of padding ---------------------------------------------------------------------------------------------------------


@both_paths
@both_dtypes
@pytest.mark.parametrize("rows", [1, 8, 16, 33, 70])
def test_rows_of_padding_are_zero_and_do_not_matter(rows: int, dtype: torch.dtype, path: int) -> None:
    case = Case.random(rows, 520, 1000, dtype, density=0.1, device="cuda")
    for padded in ([0], [rows - 1], list(range(0, rows, 3)), list(range(rows // 2, rows)), list(range(rows))):
        is_padding = padding(rows, padded)
        finite, counted = case.run(path, is_padding)
        assert torch.equal(finite[is_padding], torch.zeros_like(finite[is_padding]))
        for value in (NAN, INF, 1e4):
            other = Case(case.x.clone(), case.gate_up, case.down_t, case.threshold)
            other.x[is_padding] = value
            y, again = other.run(path, is_padding)
            assert torch.equal(y, finite)
            assert torch.equal(again, counted)
        if len(set(padded)) < rows:
            real = Case(case.x[~is_padding], case.gate_up, case.down_t, case.threshold)
            assert real.error(finite[~is_padding], real.active(path)) <= 2 * real.error(*real.dense())


@both_paths
@both_dtypes
def test_no_padding_among_the_rows_changes_nothing(dtype: torch.dtype, path: int) -> None:
    for rows in (1, 8, 32, 70):
        case = Case.random(rows, 520, 1000, dtype, device="cuda")
        y, counted = case.run(path)
        again, counted_again = case.run(path, padding(rows, []))
        assert torch.equal(again, y)
        assert torch.equal(counted_again, counted)


# ---- nothing to do -----------------------------------------------------------------------------------------------------------


@both_paths
@both_dtypes
def test_no_rows(dtype: torch.dtype, path: int) -> None:
    case = Case.random(0, 64, 128, dtype, device="cuda")
    for is_padding in (None, padding(0, [])):
        y, counted = case.run(path, is_padding)
        assert y.shape == (0, 64)
        assert (y.dtype, y.device) == (dtype, case.x.device)
        assert counted.count_nonzero() == 0


@both_paths
@both_dtypes
def test_nothing_active(dtype: torch.dtype, path: int) -> None:
    for rows in (1, 5, 16):
        y, counted = Case.random(rows, 4096, 1000, dtype, density=0, device="cuda").run(path)
        assert torch.equal(y, torch.zeros_like(y))
        assert counted[index_of(path)].tolist() == [rows, 0, 0, 1]


# ---- input that is refused ---------------------------------------------------------------------------------------------------


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def misaligned(rows: int, columns: int) -> torch.Tensor:
    return on_gpu(rows * columns + 1)[1:].view(rows, columns)


# Made when a test asks for it: on a machine without a GPU these tests are collected, too.
BAD = {
    "x of another dtype": ("x", lambda: on_gpu(4, 64, dtype=torch.float64), "x must be bfloat16, float16 or float32"),
    "x not contiguous": ("x", lambda: on_gpu(64, 4).t(), "x must be contiguous"),
    "x misaligned": ("x", lambda: misaligned(4, 64), "x must start at a multiple of 16 bytes; pass a copy instead"),
    "gate_up misaligned": ("gate_up", lambda: misaligned(256, 64), "gate_up must start at a multiple of 16 bytes"),
    "down_t misaligned": ("down_t", lambda: misaligned(128, 64), "down_t must start at a multiple of 16 bytes"),
    "gate_up of another dtype": (
        "gate_up",
        lambda: on_gpu(256, 64, dtype=torch.float16),
        "gate_up must have the dtype of x",
    ),
    "down_t on the CPU": (
        "down_t",
        lambda: torch.zeros(128, 64, dtype=torch.bfloat16),
        "down_t must be on the device of x",
    ),
    "counters on the CPU": ("counters", counters.new_counters, "counters must be on the device of x"),
    "is_padding on the CPU": (
        "is_padding",
        lambda: torch.zeros(4, dtype=torch.bool),
        "is_padding must be on the device of x",
    ),
    "is_padding of another length": (
        "is_padding",
        lambda: padding(5, []),
        r"is_padding must be a contiguous bool tensor of shape \[rows\] = \[4\]",
    ),
    "down as it is in a checkpoint": (
        "down_t",
        lambda: on_gpu(64, 128),
        r"down_t must be \[d_ff, d_model\] = \[128, 64\], but it is \[64, 128\]",
    ),
    "NaN threshold": ("threshold", lambda: NAN, "threshold must be finite and not negative"),
}


@pytest.mark.parametrize(("name", "make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(name: str, make: Callable[[], torch.Tensor | float], message: str) -> None:
    given: dict[str, torch.Tensor | float] = {
        "x": on_gpu(4, 64),
        "gate_up": on_gpu(256, 64),
        "down_t": on_gpu(128, 64),
        "threshold": 0.0,
        "counters": counters.new_counters("cuda"),
    }
    op.sparse_gated_ffn(**given, max_sparse_rows=ALL_SPARSE)
    given[name] = make()
    with pytest.raises(RuntimeError, match=message):
        op.sparse_gated_ffn(**given, max_sparse_rows=ALL_SPARSE)
    with pytest.raises(RuntimeError, match=message):
        op.check_arguments(**given)
