from types import SimpleNamespace

import pytest
from vllm import ModelRegistry

from sparse_backend.checkpoint import MODEL_CLASS
from sparse_backend.vllm_plugin import ffn_path, plugin
from sparse_backend.vllm_plugin.models import llama
from sparse_backend.vllm_plugin.models.llama import SparseLlamaForCausalLM
from tests.checkpoints import write_tiny_checkpoint


@pytest.mark.parametrize(("configured", "flag"), [("lora_config", "--enable-lora"), ("quant_config", "--quantization")])
def test_what_the_op_would_silently_ignore_is_refused(configured, flag):
    config = SimpleNamespace(**{"lora_config": None, "quant_config": None, configured: object()})
    with pytest.raises(ValueError, match=flag):
        SparseLlamaForCausalLM(vllm_config=config)


@pytest.mark.parametrize("ranks", [3, 64])
def test_neurons_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch, ranks):
    config = vllm_config(tmp_path, {})
    config.lora_config = config.quant_config = None
    monkeypatch.setattr(llama, "get_tensor_model_parallel_world_size", lambda: ranks)
    with pytest.raises(ValueError, match=f"--tensor-parallel-size {ranks} would give each rank .* of the 256 neurons"):
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

    def max_sparse_rows(dtype, d_model, d_ff, density, device_type):
        asked.append((dtype, d_model, d_ff, density, device_type))
        return 4

    monkeypatch.setattr(ffn_path.paths, "max_sparse_rows", max_sparse_rows)
    monkeypatch.setattr(ffn_path, "get_tensor_model_parallel_world_size", lambda: 2)
    config = vllm_config(write_tiny_checkpoint(tmp_path / "model"), {})
    assert ffn_path.max_sparse_rows_per_layer(config) == [4, 4]
    assert ffn_path.max_sparse_rows_per_layer(config) == [4, 4]
    assert asked == [("bfloat16", 64, 128, None, "cpu")] * 2
    assert config.additional_config["prosparse"]["max_sparse_rows"] == [4, 4]


def test_given_densities_go_before_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(ffn_path.paths, "max_sparse_rows", lambda dtype, d_model, d_ff, density, _: round(10 * density))
    monkeypatch.setattr(ffn_path, "get_tensor_model_parallel_world_size", lambda: 1)
    config = vllm_config(write_tiny_checkpoint(tmp_path / "model"), {"prosparse": {"densities": [0.1, 0.5]}})
    assert ffn_path.max_sparse_rows_per_layer(config) == [1, 5]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernels take up to 32 rows."""
    kernel = SimpleNamespace(name="cuda", isa="sm_90", reason="")
    monkeypatch.setattr(ffn_path, "current_platform", SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(ffn_path.native, "kernel_info", lambda device_type: {"cuda": kernel}[device_type])
    monkeypatch.setattr(ffn_path.paths, "largest_sparse_rows", lambda dtype, *_: 32 if dtype == "bfloat16" else 0)
    monkeypatch.setattr(ffn_path, "get_tensor_model_parallel_world_size", lambda: 1)
    return kernel


def test_on_a_gpu_the_sparse_path_ends_where_the_kernels_do(tmp_path, gpu):
    config = vllm_config(tmp_path, {"prosparse": {"ffn_path": "sparse"}})
    assert ffn_path.max_sparse_rows_per_layer(config) == [32, 32]


@pytest.mark.parametrize("path", ["auto", "sparse"])
@pytest.mark.parametrize("without", ["kernels", "kernels for the dtype"])
def test_a_gpu_without_kernels_measures_nothing(tmp_path, monkeypatch, gpu, path, without):
    monkeypatch.setattr(ffn_path.paths, "max_sparse_rows", lambda *_: pytest.fail("measured"))
    config = vllm_config(tmp_path, {"prosparse": {"ffn_path": path}})
    if without == "kernels":
        gpu.name, gpu.reason = "reference", "no nvcc"
    else:
        config.model_config.dtype = "float32"
    assert ffn_path.max_sparse_rows_per_layer(config) == [0, 0]


def test_unknown_plugin_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ffn_paht"):
        ffn_path.max_sparse_rows_per_layer(vllm_config(tmp_path, {"prosparse": {"ffn_paht": "auto"}}))
