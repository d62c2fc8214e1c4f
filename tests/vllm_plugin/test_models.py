from types import SimpleNamespace

import pytest
from vllm import ModelRegistry

from sparse_backend.checkpoint import MODEL_CLASS
from sparse_backend.vllm_plugin import ffn_path, plugin
from sparse_backend.vllm_plugin.models.llama import SparseLlamaForCausalLM
from tests.checkpoints import write_tiny_checkpoint


@pytest.mark.parametrize(("configured", "flag"), [("lora_config", "--enable-lora"), ("quant_config", "--quantization")])
def test_what_the_op_would_silently_ignore_is_refused(configured, flag):
    config = SimpleNamespace(**{"lora_config": None, "quant_config": None, configured: object()})
    with pytest.raises(ValueError, match=flag):
        SparseLlamaForCausalLM(vllm_config=config)


def test_registering_twice_is_fine():
    plugin.register()
    plugin.register()
    assert MODEL_CLASS in ModelRegistry.get_supported_archs()


def vllm_config(folder, additional):
    hf_config = SimpleNamespace(num_hidden_layers=2, hidden_size=64, intermediate_size=256)
    model = SimpleNamespace(hf_config=hf_config, model=str(folder), dtype="bfloat16")
    return SimpleNamespace(model_config=model, additional_config=additional)


@pytest.mark.parametrize(("path", "limit"), [("dense", 0), ("sparse", 2**31 - 1)])
def test_a_forced_path_needs_no_measurement(tmp_path, monkeypatch, path, limit):
    monkeypatch.setattr(ffn_path.paths, "max_sparse_rows", lambda *_: pytest.fail("measured"))
    config = vllm_config(tmp_path, {"prosparse": {"ffn_path": path}})
    assert ffn_path.max_sparse_rows_per_layer(config) == [limit, limit]


def test_auto_looks_the_limits_up_once_and_leaves_them_in_the_compilation_key(tmp_path, monkeypatch):
    asked = []

    def max_sparse_rows(dtype, d_model, d_ff, density):
        asked.append((dtype, d_model, d_ff, density))
        return 4

    monkeypatch.setattr(ffn_path.paths, "max_sparse_rows", max_sparse_rows)
    monkeypatch.setattr(ffn_path, "get_tensor_model_parallel_world_size", lambda: 2)
    config = vllm_config(write_tiny_checkpoint(tmp_path / "model"), {})
    assert ffn_path.max_sparse_rows_per_layer(config) == [4, 4]
    assert ffn_path.max_sparse_rows_per_layer(config) == [4, 4]
    assert asked == [("bfloat16", 64, 128, None)] * 2
    assert config.additional_config == {"prosparse": {"ffn_path": "auto", "max_sparse_rows": [4, 4]}}


def test_unknown_plugin_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ffn_paht"):
        ffn_path.max_sparse_rows_per_layer(vllm_config(tmp_path, {"prosparse": {"ffn_paht": "auto"}}))
