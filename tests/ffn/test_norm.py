"""The norm in front of the feed-forward layer, where plain PyTorch computes it: vLLM's own, to the bit."""

import pytest
import torch
from vllm import ir

from sparse_backend.ffn.norm import add_rms_norm, is_early


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 264)], ids=str)
def test_it_is_vllms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
    assert torch.equal(y, expected)
    assert torch.equal(total, expected_total)


def test_the_op_keeps_torchs_rules() -> None:
    arguments = (torch.randn(3, 16), torch.randn(3, 16), torch.randn(16), 1e-6)
    torch.library.opcheck(torch.ops.prosparse.add_rms_norm.default, arguments)


def test_nothing_starts_early_without_a_kernel() -> None:
    assert not is_early(torch.bfloat16, 4096, "cpu")
    assert not is_early(torch.float32, 4096, "cuda")
    assert not is_early(torch.bfloat16, 4097, "cuda")
