import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_backend.prosparse.regulariser import ActivationL1
from tests.prosparse.jobs import ROOT
from tests.prosparse.models import random_llama, random_tokens


class GatedFFN(nn.Module):
    """A gated feed-forward layer that is not LLaMA's, with its modules in another order."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.act_fn = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


class Stack(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(GatedFFN(16, 40) for _ in range(3))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x))
        return x


def dense_reference(stack: Stack, x: Tensor, weight: float) -> Tensor:
    """Loss and penalty written out: mean over tokens of the sum over d_ff of |relu(gate)*up|, summed over layers."""
    penalty = torch.zeros(())
    for layer in stack.layers:
        gate, up, down = (part.weight for part in (layer.gate_proj, layer.up_proj, layer.down_proj))
        x1 = torch.relu(x @ gate.T) * (x @ up.T)
        penalty = penalty + x1.abs().sum(-1).mean()
        x = x + x1 @ down.T
    return x.square().mean() + weight * penalty


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def with_norm(l1: ActivationL1, model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """A model's output, and the norm collected on the way."""
    with l1.collecting(penalise=True):
        output = model(x)
    return output, l1.take_norm()


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "gradient checkpointing"])
def test_gradient_is_that_of_a_dense_reference(recompute: bool) -> None:
    stack = Stack(recompute)
    l1 = ActivationL1(stack)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    # Twice: what recomputation does in the first backward pass must not show in the second.
    for _ in range(2):
        output, norm = with_norm(l1, stack, x)
        loss = output.square().mean() + 0.3 * norm
        expected = dense_reference(stack, x, 0.3)
        torch.testing.assert_close(loss, expected)
        for found, wanted in zip(gradients(stack, loss), gradients(stack, expected), strict=True):
            torch.testing.assert_close(found, wanted)
    without = gradients(stack, dense_reference(stack, x, 0.0))
    assert not torch.allclose(gradients(stack, dense_reference(stack, x, 0.3))[1], without[1])


def test_half_precision_norm_is_summed_in_float32() -> None:
    # 4,097 ones are beyond what a bfloat16 sum can hold.
    ffn = GatedFFN(1, 4097)
    for part in (ffn.gate_proj, ffn.up_proj):
        nn.init.ones_(part.weight)
    ffn.to(torch.bfloat16)
    _, norm = with_norm(ActivationL1(ffn), ffn, torch.ones(3, 1, dtype=torch.bfloat16))
    assert norm.item() == 4097.0


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean_tokens_sum_dff", 1 / 14), ("mean", 1 / 14 / 40)])
def test_reductions_within_a_layer_and_their_scale(reduction: Any, share: float) -> None:
    stack = Stack()
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))
    _, norm = with_norm(ActivationL1(stack, reduction, scale=0.5), stack, x)
    expected = torch.zeros(())
    for layer in stack.layers:
        x1 = F.relu(layer.gate_proj(x)) * layer.up_proj(x)
        expected = expected + x1.abs().sum() * share
        x = x + layer.down_proj(x1)
    torch.testing.assert_close(norm, 0.5 * expected)


def test_norm_does_not_depend_on_the_batch() -> None:
    model = random_llama().train()
    l1 = ActivationL1(model)
    tokens = random_tokens(4, 16)
    _, whole = with_norm(l1, model, tokens)
    halves = [with_norm(l1, model, half)[1] for half in tokens.chunk(2)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_sparsity_is_the_share_of_zeros_that_enter_down_proj() -> None:
    stack = Stack()
    l1 = ActivationL1(stack)
    l1.counting = True
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))
    with l1.collecting(penalise=False):
        stack(x)
    zeros = []
    for layer in stack.layers:
        x1 = F.relu(layer.gate_proj(x)) * layer.up_proj(x)
        zeros.append((x1 == 0).float().mean())
        x = x + layer.down_proj(x1)
    assert l1.take_sparsity().item() == pytest.approx(torch.stack(zeros).mean().item(), abs=1e-6)


def test_removal_leaves_the_model_as_it_was() -> None:
    stack = Stack()
    l1 = ActivationL1(stack)
    l1.remove()
    assert not [module for module in stack.modules() if module._forward_pre_hooks]


def test_gradient_is_the_same_under_fsdp() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launcher, "-m", "tests.prosparse.sharded_gradients"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert "gradients agree" in finished.stdout, finished.stderr
