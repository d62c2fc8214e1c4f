import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_backend.activation import Activation
from sparse_backend.errors import UserError
from sparse_backend.hf_configs import SPARSE_CONFIGS, SparseLlamaConfig
from sparse_backend.prosparse import modeling
from sparse_backend.prosparse.checkpoints import check_base, check_base_loss, load_model, save_activation, save_weights
from sparse_backend.prosparse.gated_ffn import gated_ffns, watching
from sparse_backend.prosparse.modeling import SPARSE_MODELS, FatReLU, MiniCPMForCausalLM, SparseLlamaForCausalLM
from tests.prosparse.models import random_model, random_tokens

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


def test_configs_and_models_are_of_the_same_families() -> None:
    assert SPARSE_MODELS.keys() == SPARSE_CONFIGS.keys()
    for family, model in SPARSE_MODELS.items():
        assert model.config_class is SPARSE_CONFIGS[family]


@pytest.mark.parametrize("family", SPARSE_MODELS)
def test_saved_fatrelu_folder_loads_with_its_threshold_in_every_layer(tmp_path: Path, family: str) -> None:
    save_weights(random_model(family), tmp_path)
    architecture = save_activation(tmp_path, Activation(kind="fatrelu", threshold=0.3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is SPARSE_MODELS[family]
    assert architecture == type(loaded).__name__
    assert (loaded.config.hidden_act, loaded.config.hidden_act_param) == ("fatrelu", 0.3)
    plain = random_model(family).eval()
    plain.load_state_dict({name: tensor.bfloat16().float() for name, tensor in plain.state_dict().items()})
    tokens = random_tokens(2, 16)
    assert not torch.equal(loaded(tokens).logits, plain(tokens).logits)
    assert len(gated_ffns(plain)) == 2
    for ffn in gated_ffns(plain):
        ffn.act_fn = FatReLU(0.3)
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("family", SPARSE_MODELS)
def test_dense_base_of_each_family_takes_relu_and_a_penalty_on_every_layer(tmp_path: Path, family: str) -> None:
    save_weights(random_model(family, hidden_act="silu"), tmp_path)
    assert check_base(tmp_path) == "silu"
    model = load_model(tmp_path, torch.float32, hidden_act="relu").train()
    assert model.config.model_type == family
    assert {type(ffn.act_fn) for ffn in gated_ffns(model)} == {torch.nn.ReLU}
    norms = []
    with watching(model, "down_proj", lambda _layer, x1: norms.append(x1.abs().sum())):
        model(random_tokens(2, 16))
    torch.stack(norms).sum().backward()
    assert all(ffn.gate_proj.weight.grad.abs().sum() > 0 for ffn in gated_ffns(model))


@pytest.mark.parametrize("family", [family for family in SPARSE_MODELS if family != "minicpm"])
def test_saved_relu_folder_loads_in_plain_transformers(tmp_path: Path, family: str) -> None:
    save_weights(random_model(family), tmp_path)
    architecture = save_activation(tmp_path, Activation(kind="relu"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    assert type(loaded).__name__ == architecture
    assert isinstance(loaded.model.layers[0].mlp.act_fn, torch.nn.ReLU)


@pytest.mark.parametrize("loss", [12.0, float("nan")])
def test_base_that_is_worse_than_guessing_is_refused(tmp_path: Path, loss: float) -> None:
    with pytest.raises(UserError, match="tokenizer and its weights do not belong together"):
        check_base_loss(tmp_path, loss, 4096)
    check_base_loss(tmp_path, 8.5, 4096)


def test_minicpm_is_a_llama_with_its_scales_in_the_weights() -> None:
    minicpm = random_model("minicpm", hidden_act="silu").eval()
    llama = random_model("llama", hidden_act="silu").eval()
    state = {name: tensor.clone() for name, tensor in minicpm.state_dict().items()}
    state["model.embed_tokens.weight"] *= 12
    state["lm_head.weight"] /= 32 / 16
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] *= 1.4 / 2**0.5
    llama.load_state_dict(state)
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(minicpm(tokens).logits, llama(tokens).logits)


def test_published_minicpm_config_is_read_without_its_remote_code(tmp_path: Path) -> None:
    # Fields of openbmb/MiniCPM-S-1B-sft, smaller.
    random_model("minicpm").save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    derived = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    published = {name: value for name, value in own.items() if name not in derived}
    published |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.03,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MiniCPMForCausalLM
    assert [ffn.act_fn.threshold for ffn in gated_ffns(loaded)] == [0.03, 0.03]
    assert loaded.config.logits_scaling == 2


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_unusable_threshold_is_refused(threshold: float) -> None:
    config = SparseLlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config.hidden_act_param = threshold
    with pytest.raises(UserError, match="hidden_act_param"):
        SparseLlamaForCausalLM(config)
    assert config.hidden_act == "fatrelu"
