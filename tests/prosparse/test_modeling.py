from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_backend.activation import Activation
from sparse_backend.errors import UserError
from sparse_backend.hf_configs import SparseLlamaConfig
from sparse_backend.prosparse import modeling
from sparse_backend.prosparse.checkpoints import save_activation, save_weights
from sparse_backend.prosparse.modeling import FatReLU, SparseLlamaForCausalLM
from tests.prosparse.models import random_llama, random_tokens

modeling.register()


def test_comparison_is_strict_and_in_float32() -> None:
    # bfloat16's nearest value to 0.01 is 0.010009765625: above the float32 threshold, so it passes.
    near = torch.tensor([0.01, 0.0099], dtype=torch.bfloat16)
    assert (FatReLU(0.01)(near) != 0).tolist() == [True, False]
    exact = torch.tensor([0.25, 0.2500001])
    assert (FatReLU(0.25)(exact) != 0).tolist() == [False, True]


def test_values_pass_unchanged_and_nan_is_not_hidden() -> None:
    gate = torch.tensor([-1.0, 0.0, 0.5, 2.0, torch.inf, torch.nan])
    out = FatReLU(0.5)(gate)
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 2.0, torch.inf, torch.nan]), equal_nan=True)
    assert FatReLU(0.5)(gate.bfloat16()).dtype == torch.bfloat16


def test_threshold_zero_is_relu() -> None:
    gate = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FatReLU(0.0)(gate), torch.relu(gate))


def test_saved_fatrelu_folder_loads_with_its_threshold_in_every_layer(tmp_path: Path) -> None:
    model = random_llama()
    save_weights(model, tmp_path)
    architecture = save_activation(tmp_path, Activation(kind="fatrelu", threshold=0.3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert architecture == "SparseLlamaForCausalLM"
    assert isinstance(loaded, SparseLlamaForCausalLM)
    assert (loaded.config.hidden_act, loaded.config.hidden_act_param) == ("fatrelu", 0.3)
    plain = random_llama()
    plain.load_state_dict({name: tensor.bfloat16().float() for name, tensor in plain.state_dict().items()})
    for layer in plain.model.layers:
        layer.mlp.act_fn = FatReLU(0.3)
    tokens = random_tokens(2, 16)
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_saved_relu_folder_loads_in_plain_transformers(tmp_path: Path) -> None:
    save_weights(random_llama(), tmp_path)
    assert save_activation(tmp_path, Activation(kind="relu")) == "LlamaForCausalLM"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert isinstance(loaded.model.layers[0].mlp.act_fn, torch.nn.ReLU)


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_unusable_threshold_is_refused(threshold: float) -> None:
    config = SparseLlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config.hidden_act_param = threshold
    with pytest.raises(UserError, match="hidden_act_param"):
        SparseLlamaForCausalLM(config)
    assert config.hidden_act == "fatrelu"
