"""The norm kernel: exact, and safe in front of a layer that starts while it runs."""

import pytest
import torch

from sparse_backend.ffn import counters, sparse_gated_ffn
from sparse_backend.ffn.norm import _reference, add_rms_norm, is_early
from tests.ffn.layers import ALL_SPARSE, Case
from tests.gpu.device import NEEDS_GPU, both_dtypes

pytestmark = NEEDS_GPU

EPSILON = 1e-5


def arguments(
    rows: int, d_model: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    return random(rows, d_model), random(rows, d_model), random(d_model)


@both_dtypes
@pytest.mark.parametrize("d_model", [8, 40, 264, 4096, 5120, 8200, 16384, 32768])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 33, 2048])
def test_error_is_at_most_twice_the_references(rows: int, d_model: int, dtype: torch.dtype) -> None:
    assert is_early(dtype, d_model, "cuda")
    x, residual, weight = arguments(rows, d_model, dtype)
    exact = x.double() + residual.double()
    normal = exact * torch.rsqrt(exact.square().mean(dim=1, keepdim=True) + EPSILON) * weight.double()
    y, total = add_rms_norm(x, residual, weight, EPSILON)
    reference, reference_total = _reference(x, residual, weight, EPSILON)
    assert torch.equal(total, reference_total)
    assert (y.double() - normal).norm() <= 2 * (reference.double() - normal).norm()
    again, _ = add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(again, y)


@both_dtypes
def test_a_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x, residual, weight = arguments(3, 4096, dtype)
    clean, _ = add_rms_norm(x, residual, weight, EPSILON)
    x[1, 7] = torch.nan
    y, _ = add_rms_norm(x, residual, weight, EPSILON)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@both_dtypes
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_a_layer_behind_it_sees_its_result(rows: int, dtype: torch.dtype) -> None:
    """The gate kernel starts while the norm runs: from a graph, over and over, with new input each time, it must wait for y."""
    case = Case.random(rows, 4096, 11008, dtype, density=0.107, device="cuda")
    x, residual, weight = arguments(rows, 4096, dtype)
    counted = counters.new_counters(torch.device("cuda"))

    def chain() -> torch.Tensor:
        y, total = add_rms_norm(x, residual, weight, EPSILON)
        out = sparse_gated_ffn(y, case.gate_up, case.down_t, case.threshold, counted, ALL_SPARSE)
        y, _ = add_rms_norm(out, total, weight, EPSILON)
        return sparse_gated_ffn(y, case.gate_up, case.down_t, case.threshold, counted, ALL_SPARSE)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for seed in range(1, 40):
        new_x, new_residual, _ = arguments(rows, 4096, dtype, seed)
        x.copy_(new_x)
        residual.copy_(new_residual)
        torch.cuda.synchronize()
        y, total = _reference(x, residual, weight, EPSILON)
        graph.replay()
        found = captured.clone()
        first, total = add_rms_norm(x, residual, weight, EPSILON)
        torch.cuda.synchronize()
        torch.testing.assert_close(first, y, rtol=0.02, atol=0.02)
        out = sparse_gated_ffn(first, case.gate_up, case.down_t, case.threshold, counted, ALL_SPARSE)
        torch.cuda.synchronize()
        second, _ = add_rms_norm(out, total, weight, EPSILON)
        torch.cuda.synchronize()
        assert torch.equal(
            found, sparse_gated_ffn(second, case.gate_up, case.down_t, case.threshold, counted, ALL_SPARSE)
        )


def test_bad_tensors_are_refused_by_name() -> None:
    x, residual, weight = arguments(2, 16, torch.bfloat16)
    with pytest.raises(RuntimeError, match="residual must have the shape of x"):
        add_rms_norm(x, residual[:1], weight, EPSILON)
    with pytest.raises(RuntimeError, match="residual must have the dtype of x"):
        add_rms_norm(x, residual.half(), weight, EPSILON)
    with pytest.raises(RuntimeError, match="weight must be a contiguous vector of d_model = 16"):
        add_rms_norm(x, residual, weight[:8], EPSILON)
    with pytest.raises(RuntimeError, match="d_model must be a positive multiple of 8"):
        add_rms_norm(x[:, :12].contiguous(), residual[:, :12].contiguous(), weight[:12], EPSILON)
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16 on a GPU"):
        add_rms_norm(x.float(), residual.float(), weight.float(), EPSILON)
