from collections.abc import Callable

import pytest
import torch

from sparse_backend.ffn import counters, reference
from sparse_backend.ffn.counters import SPARSE
from tests.ffn.layers import Case


def test_definition_neuron_by_neuron() -> None:
    case = Case.random(3, 8, 16, torch.float32, density=0.4, threshold=0.3)
    y = torch.zeros(3, 8, dtype=torch.float64)
    active = 0
    for row in range(3):
        for neuron in range(16):
            gate = case.x[row].double() @ case.gate_up[neuron].double()
            up = case.x[row].double() @ case.gate_up[16 + neuron].double()
            if gate > 0.3:
                active += 1
                y[row] += gate * up * case.down_t[neuron].double()
    counted = counters.new_counters()
    result = reference.sparse_gated_ffn(case.x, case.gate_up, case.down_t, 0.3, counted)
    torch.testing.assert_close(result.double(), y, rtol=1e-5, atol=1e-6)
    assert counted[SPARSE, counters.ACTIVE] == active > 0


def test_both_references_agree() -> None:
    case = Case.random(5, 64, 128, torch.float32, threshold=0.1)
    sparse, dense = counters.new_counters(), counters.new_counters()
    torch.testing.assert_close(
        reference.sparse_gated_ffn(case.x, case.gate_up, case.down_t, 0.1, sparse),
        reference.dense_gated_ffn(case.x, case.gate_up, case.down_t, 0.1, dense),
    )
    assert torch.equal(sparse.flip(0), dense)


@pytest.mark.parametrize(
    ("gate", "active"), [(0.5, False), (0.51, True), (-1.0, False), (float("nan"), True), (float("inf"), True)]
)
def test_active_is_strictly_above_or_nan(gate: float, active: bool) -> None:
    assert reference.active_neurons(torch.tensor([[gate]]), 0.5).item() is active


def test_count_ignores_empty_calls() -> None:
    counted = counters.new_counters()
    reference.count(counted, SPARSE, torch.zeros(0, 8, dtype=torch.bool))
    assert counted.count_nonzero() == 0


@pytest.mark.parametrize("padded", [[1], [0, 3, 4], [0, 1, 2, 3, 4]], ids=["one", "three", "all"])
@pytest.mark.parametrize("ffn", [reference.sparse_gated_ffn, reference.dense_gated_ffn])
def test_rows_of_padding_are_left_out(ffn: Callable[..., torch.Tensor], padded: list[int]) -> None:
    case = Case.random(5, 64, 128, torch.float32, density=0.5)
    is_padding = torch.zeros(5, dtype=torch.bool)
    is_padding[padded] = True
    expected, counted = counters.new_counters(), counters.new_counters()
    real = ffn(case.x[~is_padding], case.gate_up, case.down_t, 0.0, expected)
    case.x[is_padding] = float("nan")
    y = ffn(case.x, case.gate_up, case.down_t, 0.0, counted, is_padding)
    torch.testing.assert_close(y[~is_padding], real)
    assert torch.equal(y[is_padding], torch.zeros(len(padded), 64))
    assert torch.equal(counted, expected)
