import pytest
import torch
from torch.nn import functional as F

from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.tokens import HeldOutBlocks
from tests.prosparse.models import random_llama, random_tokens


def test_loss_is_that_of_the_model_itself() -> None:
    model = random_llama()
    tokens = random_tokens(5, 16)
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss.item()
    assert measure(model, HeldOutBlocks(tokens.flatten(), 16)).loss == pytest.approx(expected, rel=1e-5)


def test_batching_changes_nothing() -> None:
    model = random_llama()
    blocks = HeldOutBlocks(random_tokens(5, 16).flatten(), 16)
    whole, single = measure(model, blocks, batch_tokens=1000), measure(model, blocks, batch_tokens=1)
    assert whole.loss == pytest.approx(single.loss, rel=1e-5)
    assert torch.equal(whole.neuron_frequency, single.neuron_frequency)


def test_frequency_and_sparsity_are_counts_of_the_first_layers_own_values() -> None:
    model = random_llama()
    tokens = random_tokens(5, 16)
    measured = measure(model, HeldOutBlocks(tokens.flatten(), 16))
    first = model.model.layers[0]
    with torch.no_grad():
        x = model.model.embed_tokens(tokens)
        positions = model.model.rotary_emb(x, torch.arange(16)[None])
        attended, _ = first.self_attn(first.input_layernorm(x), position_embeddings=positions, attention_mask=None)
        x = first.post_attention_layernorm(x + attended)
        gate = first.mlp.gate_proj(x)
        x1 = F.relu(gate) * first.mlp.up_proj(x)
    frequency = (x1 != 0).double().mean((0, 1))
    # A gate within rounding of 0 may count differently: at most one of the 80 tokens.
    torch.testing.assert_close(measured.neuron_frequency[0], frequency, atol=1 / 80, rtol=0)
    assert measured.sparsity[0].item() == pytest.approx((x1 == 0).double().mean().item(), abs=1e-3)
    assert measured.mean_sparsity == pytest.approx(measured.sparsity.mean().item())


def test_gate_scale_is_the_root_mean_square_of_all_gates() -> None:
    model = random_llama(num_hidden_layers=1)
    tokens = random_tokens(3, 16)
    gates = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _m, _i, gate: gates.append(gate))
    measured = measure(model, HeldOutBlocks(tokens.flatten(), 16))
    assert measured.gate_scale == pytest.approx(torch.cat(gates).square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training: bool) -> None:
    model = random_llama().train(training)
    measure(model, HeldOutBlocks(random_tokens(1, 16).flatten(), 16))
    assert model.training is training
