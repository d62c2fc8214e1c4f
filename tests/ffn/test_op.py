import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparse_backend.ffn import counters, native, op, reference
from sparse_backend.ffn.counters import ACTIVE, DENSE, ROWS, SPARSE, STEPS, UNION
from tests.ffn.layers import ALL_DENSE, ALL_SPARSE, DTYPES, Case
from tests.ffn.without_compiler import run_without_compiler

both_paths = pytest.mark.parametrize("path", [ALL_SPARSE, ALL_DENSE], ids=["sparse", "dense"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def index_of(path: int) -> int:
    return SPARSE if path == ALL_SPARSE else DENSE


# ---- counters ----------------------------------------------------------------------------------------------------------------


@both_dtypes
@both_paths
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 70])
def test_counters_equal_a_plain_count_of_the_same_gates(isa: str, dtype: torch.dtype, path: int, rows: int) -> None:
    for density, threshold in [(0.0, 0.5), (0.1, 0.0), (0.3, 0.7), (1.0, 0.0)]:
        case = Case.random(rows, 136, 264, dtype, density=density, threshold=threshold)
        _, counted = case.run(path)
        expected = counters.new_counters()
        reference.count(expected, index_of(path), case.active(path))
        assert torch.equal(counted, expected)


@both_dtypes
def test_gate_values_are_the_products(isa: str, dtype: torch.dtype) -> None:
    case = Case.random(37, 520, 264, dtype)
    values = case.gates(ALL_SPARSE)
    assert values.dtype == torch.float32
    exact = case.x.double() @ case.gate_up[:264].double().t()
    magnitude = case.x.double().abs() @ case.gate_up[:264].double().abs().t()
    # Higham 2002, eq. 3.5, the error bound of any order of summation.
    assert torch.all((values.double() - exact).abs() <= 520 * torch.finfo(torch.float32).eps * magnitude)


@both_dtypes
@both_paths
@pytest.mark.parametrize("drelu", [False, True], ids=["relu", "drelu"])
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 70])
def test_each_row_is_counted_and_nothing_else_changes(
    isa: str, dtype: torch.dtype, path: int, rows: int, drelu: bool
) -> None:
    case = Case.random(rows, 136, 1032, dtype, density=0.2, threshold=0.3, drelu=drelu)
    row_active = torch.arange(rows + 2, dtype=torch.int32)
    y, counted = case.run_row_active(path, row_active)
    of_row = case.active(path).sum(dim=1)
    assert row_active.tolist() == [*(torch.arange(rows) + of_row).tolist(), rows, rows + 1]
    without = case.run(path)
    assert torch.equal(y, without[0])
    assert torch.equal(counted, without[1])


@both_paths
@pytest.mark.parametrize("padded", [[], [0], [2, 3, 6], [0, 1, 2, 3, 4, 5, 6]], ids=["none", "one", "three", "all"])
def test_rows_of_padding_add_nothing_to_their_place(path: int, padded: list[int]) -> None:
    case = Case.random(7, 72, 128, torch.bfloat16)
    of_row = reference.active_neurons(case.gates(path), case.threshold).sum(dim=1)
    is_padding = torch.zeros(7, dtype=torch.bool)
    is_padding[padded] = True
    row_active = torch.zeros(7, dtype=torch.int32)
    case.run_row_active(path, row_active, is_padding)
    assert row_active.tolist() == of_row.masked_fill(is_padding, 0).tolist()


def test_counters_are_cumulative_and_per_path() -> None:
    case = Case.random(4, 64, 128, torch.float32)
    counted = counters.new_counters()
    for limit in (ALL_SPARSE, ALL_SPARSE, 3):
        op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, case.threshold, counted, limit)
    once = case.run(ALL_SPARSE)[1]
    assert counted[SPARSE].tolist() == (2 * once[SPARSE]).tolist()
    assert counted[DENSE, [ROWS, STEPS]].tolist() == [4, 1]


def test_row_limit_is_inclusive() -> None:
    case = Case.random(4, 64, 128, torch.float32)
    assert case.run(4)[1][SPARSE, STEPS] == 1
    assert case.run(3)[1][DENSE, STEPS] == 1


def test_union_spans_all_rows_of_a_call(isa: str) -> None:
    """Rows are worked on 32 at a time; each neuron here is active in exactly one of 64 rows."""
    d_model = d_ff = 64
    gate_up = torch.cat([2 * torch.eye(d_ff) - 1, torch.ones(d_ff, d_model)])
    counted = counters.new_counters()
    op.sparse_gated_ffn(torch.eye(d_model), gate_up, torch.ones(d_ff, d_model), 0.0, counted, ALL_SPARSE)
    assert counted[SPARSE].tolist() == [64, 64, 64, 1]


# ---- padding -----------------------------------------------------------------------------------------------------------------


@both_dtypes
@both_paths
@pytest.mark.parametrize("padded", [[], [0], [2, 3, 6], [0, 1, 2, 3, 4, 5, 6]], ids=["none", "one", "three", "all"])
def test_rows_of_padding_are_neither_computed_nor_counted(
    isa: str, dtype: torch.dtype, path: int, padded: list[int]
) -> None:
    case = Case.random(7, 72, 136, dtype, density=0.5)
    is_padding = torch.zeros(7, dtype=torch.bool)
    is_padding[padded] = True
    real = Case(case.x[~is_padding], case.gate_up, case.down_t, case.threshold)
    expected, expected_counts = real.run(path)
    case.x[is_padding] = float("nan")
    counted = counters.new_counters()
    y = op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, case.threshold, counted, path, is_padding)
    assert torch.equal(y[~is_padding], expected)
    assert torch.equal(y[is_padding], torch.zeros(len(padded), 72, dtype=dtype))
    assert torch.equal(counted, expected_counts)


def test_row_limit_counts_rows_of_padding() -> None:
    case = Case.random(4, 64, 128, torch.float32)
    counted = counters.new_counters()
    is_padding = torch.tensor([False, True, True, True])
    op.sparse_gated_ffn(case.x, case.gate_up, case.down_t, case.threshold, counted, 3, is_padding)
    assert counted[DENSE, [ROWS, STEPS]].tolist() == [1, 1]
    assert counted[SPARSE].count_nonzero() == 0


# ---- edges -------------------------------------------------------------------------------------------------------------------


@both_dtypes
@both_paths
def test_no_rows(isa: str, dtype: torch.dtype, path: int) -> None:
    y, counted = Case.random(0, 64, 128, dtype).run(path)
    assert y.shape == (0, 64)
    assert y.dtype == dtype
    assert counted.count_nonzero() == 0


@both_dtypes
@both_paths
def test_nothing_active(isa: str, dtype: torch.dtype, path: int) -> None:
    y, counted = Case.random(5, 64, 128, dtype, density=0).run(path)
    assert torch.equal(y, torch.zeros(5, 64, dtype=dtype))
    assert counted[index_of(path)].tolist() == [5, 0, 0, 1]


@both_dtypes
@both_paths
def test_everything_active(isa: str, dtype: torch.dtype, path: int) -> None:
    _, counted = Case.random(5, 64, 128, dtype, density=1).run(path)
    assert counted[index_of(path)].tolist() == [5, 5 * 128, 128, 1]


@both_paths
@pytest.mark.parametrize(
    ("dtype", "gate", "threshold", "active"),
    [
        (torch.float32, 0.0, 0.0, False),
        (torch.float32, -0.0, 0.0, False),
        (torch.float32, 1e-30, 0.0, True),
        # The threshold is rounded to float32: the float64 0.01 lies above this gate, the float32 one does not.
        (torch.float32, 0.01, 0.01, False),
        (torch.float32, torch.nextafter(torch.tensor(0.01), torch.tensor(1.0)).item(), 0.01, True),
        # bfloat16 0.01 is 0.01000977: above the float32 threshold, which is not rounded to bfloat16.
        (torch.bfloat16, 0.01, 0.01, True),
        (torch.bfloat16, 0.0099, 0.01, False),
        (torch.bfloat16, 0.5, 0.5, False),
    ],
)
def test_gate_on_the_threshold(
    isa: str, path: int, dtype: torch.dtype, gate: float, threshold: float, active: bool
) -> None:
    x = torch.zeros(2, 64, dtype=dtype)
    x[:, 3] = 1
    gate_up = torch.ones(2 * 16, 64, dtype=dtype)
    gate_up[:16] = gate
    counted = counters.new_counters()
    y = op.sparse_gated_ffn(x, gate_up, torch.ones(16, 64, dtype=dtype), threshold, counted, path)
    assert counted[index_of(path), ACTIVE] == (32 if active else 0)
    assert bool((y != 0).all()) is active


@both_dtypes
@both_paths
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 40])
def test_non_finite_rows_stay_to_themselves(isa: str, dtype: torch.dtype, path: int, value: float, row: int) -> None:
    case = Case.random(41, 72, 136, dtype)
    clean, _ = case.run(path)
    case.x[row, 5] = value
    y, counted = case.run(path)
    expected, _ = case.dense()
    assert expected[row].isnan().all()
    assert y[row].isnan().all()
    others = torch.arange(41) != row
    assert torch.equal(y[others], clean[others])
    if value != value:
        assert counted[index_of(path), UNION] == 136


@both_dtypes
@both_paths
def test_infinity_through_active_neurons_is_no_nan(isa: str, dtype: torch.dtype, path: int) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[1, 7] = float("inf")
    weights = torch.ones(2 * 16, 64, dtype=dtype)
    y = op.sparse_gated_ffn(x, weights, weights[:16], 0.0, counters.new_counters(), path)
    assert torch.equal(y[0], torch.full((64,), 64.0 * 64 * 16, dtype=dtype))
    assert torch.equal(y[1], torch.full((64,), float("inf"), dtype=dtype))


def test_dense_path_rounds_as_vllm_does() -> None:
    """vLLM's FatreluAndMul: F.threshold(gate, t, 0) * up, each in bfloat16; the product with down alone may differ in order."""
    case = Case.random(6, 64, 128, torch.bfloat16, threshold=0.25)
    gate, up = F.linear(case.x, case.gate_up).chunk(2, dim=1)
    h = F.threshold(gate, 0.25, 0.0) * up
    exact = h.double() @ case.down_t.double()
    y, _ = case.run(ALL_DENSE)
    # float32 sums of exact products, then one rounding to bfloat16's 8 bits.
    bound = 2.0**-8 * exact.abs() + 1e-5 * (h.double().abs() @ case.down_t.double().abs())
    assert torch.all((y.double() - exact).abs() <= bound)


# ---- determinism and threads -------------------------------------------------------------------------------------------------


@both_dtypes
@both_paths
def test_same_input_same_bits(isa: str, dtype: torch.dtype, path: int) -> None:
    case = Case.random(9, 520, 1000, dtype)
    first, _ = case.run(path)
    assert all(torch.equal(case.run(path)[0], first) for _ in range(5))


@both_dtypes
def test_any_number_of_threads(isa: str, threads: None, dtype: torch.dtype) -> None:
    """More threads than cores, and more than there is work for, change the order of sums only."""
    case = Case.random(5, 520, 1000, dtype)
    torch.set_num_threads(1)
    alone, counted = case.run(ALL_SPARSE)
    for number in (2, 3, 7):
        torch.set_num_threads(number)
        y, again = case.run(ALL_SPARSE)
        assert torch.equal(again, counted)
        torch.testing.assert_close(y, alone, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


# ---- torch.compile -----------------------------------------------------------------------------------------------------------


@both_dtypes
@both_paths
def test_opcheck(dtype: torch.dtype, path: int) -> None:
    case = Case.random(3, 64, 128, dtype)
    arguments = (case.x, case.gate_up, case.down_t, 0.01, counters.new_counters(), path)
    torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, arguments)
    with_padding = (*arguments, torch.tensor([False, True, False]))
    torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, with_padding)
    with_row_active = (*with_padding, False, torch.zeros(8, dtype=torch.int32))
    torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, with_row_active)
    torch.library.opcheck(torch.ops.prosparse.sparse_gate.default, (case.x, case.gate_up))


def test_compiled_graph_keeps_counting() -> None:
    case = Case.random(4, 64, 128, torch.float32)

    def step(x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return op.sparse_gated_ffn(x * 1.0, case.gate_up, case.down_t, 0.0, counted, ALL_SPARSE) + x

    counted = counters.new_counters()
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        y = compiled(case.x, counted)
    expected, once = case.run(ALL_SPARSE)
    assert torch.equal(y, expected + case.x)
    assert torch.equal(counted, 3 * once)


# ---- bad input: the kernels and the reference refuse it in the same words ----------------------------------------------------


def arguments() -> dict[str, torch.Tensor | float]:
    case = Case.random(4, 64, 128, torch.float32)
    return {
        "x": case.x,
        "gate_up": case.gate_up,
        "down_t": case.down_t,
        "threshold": 0.0,
        "counters": counters.new_counters(),
    }


def misaligned(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows * columns + 1)[1:].view(rows, columns)


BAD = {
    "x of another dtype": ("x", torch.zeros(4, 64, dtype=torch.float64), "x must be bfloat16 or float32"),
    "float16, which takes a GPU": ("x", torch.zeros(4, 64, dtype=torch.float16), "x must be bfloat16 or float32"),
    "x not a matrix": ("x", torch.zeros(64), "x must be a matrix, but it has 1 dimensions"),
    "x not contiguous": ("x", torch.zeros(64, 4).t(), "x must be contiguous"),
    "x misaligned": ("x", misaligned(4, 64), "x must start at a multiple of 16 bytes"),
    "x of another width": (
        "x",
        torch.zeros(4, 72),
        r"gate_up must be \[2 \* d_ff, d_model\] = \[2 \* d_ff, 72\], but it is \[256, 64\]",
    ),
    "gate_up of another dtype": (
        "gate_up",
        torch.zeros(256, 64, dtype=torch.bfloat16),
        "gate_up must have the dtype of x",
    ),
    "gate_up not contiguous": ("gate_up", torch.zeros(64, 256).t(), "gate_up must be contiguous"),
    "gate_up misaligned": ("gate_up", misaligned(256, 64), "gate_up must start at"),
    "gate_up of odd length": ("gate_up", torch.zeros(257, 64), r"gate_up must be .*, but it is \[257, 64\]"),
    "d_ff no multiple of 8": (
        "gate_up",
        torch.zeros(2 * 12, 64),
        "d_ff must be a positive multiple of 8, but it is 12",
    ),
    "down as it is in a checkpoint": (
        "down_t",
        torch.zeros(64, 128),
        r"down_t must be \[d_ff, d_model\] = \[128, 64\], but it is \[64, 128\]",
    ),
    "down_t a view": ("down_t", torch.zeros(64, 128).t(), "down_t must be contiguous"),
    "negative threshold": ("threshold", -1.0, "threshold must be finite and not negative, but it is -1"),
    "NaN threshold": ("threshold", float("nan"), "threshold must be finite and not negative, but it is -?nan"),
    "counters of another dtype": ("counters", torch.zeros(2, 4), "counters must be a contiguous int64 tensor"),
    "counters of another shape": (
        "counters",
        torch.zeros(8, dtype=torch.int64),
        "counters must be a contiguous int64 tensor",
    ),
    "is_padding of another dtype": (
        "is_padding",
        torch.zeros(4, dtype=torch.uint8),
        r"is_padding must be a contiguous bool tensor of shape \[rows\] = \[4\]",
    ),
    "is_padding of another length": (
        "is_padding",
        torch.zeros(5, dtype=torch.bool),
        r"is_padding must be a contiguous bool tensor of shape \[rows\] = \[4\]",
    ),
    "row_active of another dtype": (
        "row_active",
        torch.zeros(4),
        r"row_active must be a contiguous int32 tensor of at least \[rows\] = \[4\]",
    ),
    "row_active too short": ("row_active", torch.zeros(3, dtype=torch.int32), "row_active must be"),
    "is_padding not contiguous": ("is_padding", torch.zeros(8, dtype=torch.bool)[::2], "is_padding must be"),
}


@pytest.mark.parametrize(("name", "value", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(name: str, value: torch.Tensor | float, message: str) -> None:
    given = {**arguments(), name: value}
    with pytest.raises(RuntimeError, match=message):
        op.sparse_gated_ffn(**given, max_sparse_rows=ALL_SPARSE)
    with pytest.raises(RuntimeError, match=message):
        op.check_arguments(**given)


def test_d_model_must_be_a_multiple_of_8() -> None:
    given = {**arguments(), "x": torch.zeros(4, 12), "gate_up": torch.zeros(256, 12), "down_t": torch.zeros(128, 12)}
    with pytest.raises(RuntimeError, match="d_model must be a positive multiple of 8, but it is 12"):
        op.sparse_gated_ffn(**given, max_sparse_rows=ALL_SPARSE)
    with pytest.raises(RuntimeError, match="d_model must be a positive multiple of 8, but it is 12"):
        op.check_arguments(**given)


@pytest.mark.parametrize("name", ["gate_up", "down_t", "counters", "is_padding"])
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    given = {**arguments(), "is_padding": torch.zeros(4, dtype=torch.bool)}
    given[name] = given[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of x"):
        op.check_arguments(**given)


FIRST_CALL = """
import torch
from sparse_backend.ffn import counters, op
def loaded():
    return torch._C._dispatch_has_kernel_for_dispatch_key("prosparse::sparse_gated_ffn", "CPU")
print(loaded())
counted = counters.new_counters()
call = torch.compile(lambda x: op.sparse_gated_ffn(x, torch.ones(16, 8), torch.ones(8, 8), 0.0, counted, 2), fullgraph=True)
call(torch.ones(2, 8))
print(loaded(), counted.tolist() == [[2, 16, 8, 1], [0, 0, 0, 0]])
"""


def test_the_first_call_loads_the_kernels_also_from_a_compiled_graph() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_good_input_is_taken_by_the_reference_too() -> None:
    op.check_arguments(**arguments())
    op.check_arguments(**arguments(), is_padding=torch.zeros(4, dtype=torch.bool))


# ---- without the native library ----------------------------------------------------------------------------------------------

WITHOUT_COMPILER = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from sparse_backend.ffn import counters, native, paths, sparse_gated_ffn
counted = counters.new_counters()
x = torch.ones(2, 8)
y = [sparse_gated_ffn(x, torch.ones(16, 8), torch.ones(8, 8), 0.0, counted, 2**31 - 1) for _ in range(2)]
print(native.kernel_info().name, native.kernel_info().isa == "", counted.tolist(), y[0][0, 0].item())
print(native.kernel_info().reason)
print(paths.max_sparse_rows(torch.float32, 8, 8, None))
arguments = (x, torch.ones(16, 8), torch.ones(8, 8), 0.0, counters.new_counters(), 1)
checks = torch.library.opcheck(torch.ops.prosparse.sparse_gated_ffn.default, (*arguments, torch.tensor([False, True])))
print(*set(checks.values()))
try:
    sparse_gated_ffn(x.double(), torch.ones(16, 8), torch.ones(8, 8), 0.0, counted, 1)
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_plain_torch_computes(tmp_path: Path) -> None:
    done = run_without_compiler(WITHOUT_COMPILER, tmp_path)
    kernel, reason, limit, opcheck, refusal = done.stdout.splitlines()
    assert kernel == "reference True [[0, 0, 0, 0], [4, 32, 16, 2]] 512.0"
    assert "install g++" in reason
    assert limit == "0"
    assert opcheck == "SUCCESS"
    assert refusal == "x must be bfloat16 or float32"
    # Once per process, and only because a layer was computed.
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "there is no C++ compiler" in warnings[0]


def test_kernels_are_native_here() -> None:
    """Everything above has tested the kernels, not the reference."""
    assert native.kernel_info().name == "cpu"
