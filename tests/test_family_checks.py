"""What a folder must say and hold to be served, family by family; look-alikes are refused in words."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from tests import families
from tests.checkpoints import edit_config
from tests.families import FAMILIES


def rewrite(folder: Path, change) -> None:
    """Replace the folder's tensors by ``change`` of them, {name: tensor}."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- look-alikes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["relu-llama", "qwen3", "minicpm-s"])
def test_a_dense_model_of_the_same_class_is_refused_with_what_makes_it_sparse(tmp_path, family):
    families.write(tmp_path / "model", family)
    edit_config(tmp_path / "model", hidden_act="silu")
    text = refusal(tmp_path / "model")
    assert "Swish" in text
    assert "prosparse sparsify" in text


def test_a_bamboo_with_swish_is_refused(tmp_path):
    families.write(tmp_path / "model", "bamboo")
    edit_config(tmp_path / "model", hidden_act="silu")
    assert "of model_type 'bamboo' this server computes 'relu' only" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("old", "new"),
    [("mlp.gate_proj", "mlp.w1"), ("mlp.down_proj", "feed_forward.w2"), ("layers.1.mlp.up_proj", "layers.1.mlp.c_fc")],
)
def test_other_tensor_names_are_refused_and_shown(tmp_path, old, new):
    families.write(tmp_path / "model", "relu-llama")
    rewrite(tmp_path / "model", renamed(old, new))
    text = refusal(tmp_path / "model")
    assert f"has no tensor model.layers.{int('layers.1' in old)}.mlp." in text
    assert "gate_proj, up_proj and down_proj" in text


def test_other_shapes_than_the_configs_are_refused(tmp_path):
    families.write(tmp_path / "model", "relu-llama")
    edit_config(tmp_path / "model", intermediate_size=264)
    assert "model.layers.0.mlp.gate_proj.weight is [256, 64], config.json makes it [264, 64]" in refusal(
        tmp_path / "model"
    )


def test_neurons_that_the_kernels_cannot_take_are_refused(tmp_path):
    families.write(tmp_path / "model", "turbosparse-mistral", intermediate_size=100)
    assert "intermediate_size is 100; the kernels compute multiples of 8 only" in refusal(tmp_path / "model")


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "FalconForCausalLM"])
def test_feed_forward_layers_without_a_gate_are_refused(tmp_path, architecture):
    families.write(tmp_path / "model", "relu-llama")
    edit_config(tmp_path / "model", architectures=[architecture], model_type="opt")
    text = refusal(tmp_path / "model")
    assert "have no gate" in text
    assert "plain vLLM" in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sparsity_gated_mlp": False}, "sparsity_gated_mlp is false"),
        ({"sparsity_new_intermediate_size": 512}, "sparsity_new_intermediate_size is 512 and intermediate_size 256"),
    ],
)
def test_sparselm_configs_of_another_kind_of_layer_are_refused(tmp_path, fields, expected):
    families.write(tmp_path / "model", "sparselm")
    edit_config(tmp_path / "model", **fields)
    assert expected in refusal(tmp_path / "model")


def test_a_mixture_of_experts_is_refused(tmp_path):
    families.write(tmp_path / "model", "minicpm-s")
    edit_config(tmp_path / "model", num_experts=8)
    assert "mixtures of experts are not supported" in refusal(tmp_path / "model")


@pytest.mark.parametrize("family", ["qwen2", "mistral", "sparseqwen2"])
def test_code_of_its_own_where_the_family_has_none_is_refused(tmp_path, family):
    """PowerInfer's SparseQwen2 is said to be dReLU by its code alone: computed as what hidden_act says it would be wrong."""
    families.write(tmp_path / "model", family)
    edit_config(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_sparse.SparseForCausalLM"})
    text = refusal(tmp_path / "model")
    assert "auto_map" in text
    assert "never run" in text


@pytest.mark.parametrize(
    ("architecture", "model_type"), [("LlamaForCausalLM", "bamboo"), ("BambooForCausalLM", "llama"), (None, "llama")]
)
def test_architecture_and_model_type_must_belong_together(tmp_path, architecture, model_type):
    families.write(tmp_path / "model", "relu-llama")
    edit_config(tmp_path / "model", architectures=[architecture] if architecture else None, model_type=model_type)
    text = refusal(tmp_path / "model")
    assert repr(model_type) in text
    assert "bamboo: BambooForCausalLM" in text


# ---- what is served ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_is_recognised(tmp_path, name):
    families.write(tmp_path / "model", name)
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.model_class == FAMILIES[name].in_class
    assert checkpoint.activation.kind == FAMILIES[name].activation


def test_quantised_matrices_may_have_any_shape_and_further_tensors(tmp_path):
    families.write(tmp_path / "model", "relu-llama")

    def packed(tensors):
        gate = tensors.pop("model.layers.0.mlp.gate_proj.weight")
        return tensors | {
            "model.layers.0.mlp.gate_proj.weight_packed": gate[:, :8].to(torch.int32).contiguous(),
            "model.layers.0.mlp.gate_proj.weight_scale": gate[:, :1].contiguous(),
        }

    rewrite(tmp_path / "model", packed)
    assert "has no tensor" in refusal(tmp_path / "model")
    edit_config(tmp_path / "model", quantization_config={"quant_method": "compressed-tensors"})
    assert Checkpoint.open(tmp_path / "model").model_class == "SparseLlamaForCausalLM"
