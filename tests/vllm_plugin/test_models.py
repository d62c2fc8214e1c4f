import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sparse_backend.activation import Activation
from sparse_backend.families import FAMILIES, MODEL_CLASSES
from sparse_backend.ffn import counters
from sparse_backend.ffn.counters import FIRST, ROWS, SECOND, VIEWS
from sparse_backend.vllm_plugin import ffn_path, models, plugin
from sparse_backend.vllm_plugin.mlp import SparseGatedMLP
from sparse_backend.vllm_plugin.models import SparseFeedForward, SparseLlamaForCausalLM
from tests.checkpoints import write_tiny_checkpoint


@pytest.mark.parametrize("ranks", [3, 64])
def test_neurons_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch, ranks):
    config = vllm_config(tmp_path, {})
    monkeypatch.setattr(models, "get_tensor_model_parallel_world_size", lambda: ranks)
    with pytest.raises(ValueError, match=f"--tensor-parallel-size {ranks} would give each rank .* of the 256 neurons"):
        SparseLlamaForCausalLM(vllm_config=config)


def test_registering_twice_is_fine():
    plugin.register()
    plugin.register()
    assert set(MODEL_CLASSES) <= set(ModelRegistry.get_supported_archs())


def test_there_is_a_model_class_for_every_family():
    assert all(issubclass(getattr(models, family.model_class), SparseFeedForward) for family in FAMILIES)


# ---- layers that vLLM's own linear layers compute ----------------------------------------------------------------------------


class Linear(nn.Module):
    """One of vLLM's linear layers, as far as ours look at it."""

    def __init__(self, rows, columns, prefix, quant_method=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / columns**0.5, requires_grad=False)
        self.prefix, self.quant_method = prefix, quant_method or UnquantizedLinearMethod()
        self.input_size_per_partition, self.tp_size = columns, 1

    def forward(self, x):
        return nn.functional.linear(x, self.weight), None


def stock_mlp(index=0, **quant_methods):
    mlp, prefix = nn.Module(), f"model.layers.{index}.mlp"
    mlp.gate_up_proj = Linear(2 * 64, 16, f"{prefix}.gate_up_proj", quant_methods.get("gate_up_proj"))
    mlp.down_proj = Linear(16, 64, f"{prefix}.down_proj", quant_methods.get("down_proj"))
    return mlp


class Model(SparseFeedForward):
    packed_modules_mapping = SparseLlamaForCausalLM.packed_modules_mapping

    def __init__(self, *mlps):
        self.model = SimpleNamespace(layers=[SimpleNamespace(mlp=mlp) for mlp in mlps])


def with_lora(*targets):
    return SimpleNamespace(lora_config=SimpleNamespace(target_modules=list(targets) or None))


@pytest.mark.parametrize(
    ("config", "quant_methods", "reason"),
    [
        (SimpleNamespace(lora_config=None), {}, ""),
        (with_lora(), {}, "lora"),
        (with_lora("q_proj", "v_proj"), {}, ""),
        (with_lora("q_proj", "up_proj"), {}, "lora"),
        (with_lora("down_proj"), {}, "lora"),
        (with_lora("model.layers.1.mlp.down_proj"), {}, ""),
        (with_lora("model.layers.0.mlp.down_proj"), {}, "lora"),
        (SimpleNamespace(lora_config=None), {"down_proj": object()}, "quantization"),
        (SimpleNamespace(lora_config=None), {"gate_up_proj": object()}, "quantization"),
        (with_lora("q_proj"), {"gate_up_proj": object()}, "quantization"),
    ],
)
def test_layers_whose_weights_say_too_little_are_computed_densely(config, quant_methods, reason):
    assert Model()._dense_reason(stock_mlp(**quant_methods), config) == reason


def sparse_mlp(index=0, reason="", kind="relu"):
    return SparseGatedMLP(
        stock_mlp(index), layer_index=index, activation=Activation(kind=kind), max_sparse_rows=4, dense_reason=reason
    )


def test_it_is_said_once_which_layers_are_dense_and_why(caplog):
    with caplog.at_level(logging.WARNING):
        Model(
            sparse_mlp(0, "lora"), sparse_mlp(1), sparse_mlp(2, "quantization"), sparse_mlp(3, "lora")
        )._tell_of_dense_layers()
    lora, quantised = (record.getMessage() for record in caplog.records)
    assert "layers 0, 3 are computed densely" in lora
    assert "--lora-target-modules" in lora
    assert "layers 2 are computed densely" in quantised


def test_nothing_is_said_where_all_layers_are_sparse(caplog):
    with caplog.at_level(logging.WARNING):
        Model(sparse_mlp())._tell_of_dense_layers()
    assert not caplog.records


@pytest.mark.parametrize("kind", ["relu", "drelu"])
def test_a_dense_layer_leaves_the_products_to_vllm_and_counts(kind):
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    plain = sparse_mlp(kind=kind)
    dense = sparse_mlp(reason="lora", kind=kind)
    dense.gate_up_proj, dense.down_proj = plain.gate_up_proj, plain.down_proj
    y = dense(x)
    plain.make_neuron_major()
    plain.max_sparse_rows = 0
    torch.testing.assert_close(y, plain(x))
    assert torch.equal(dense.counters, plain.counters)
    assert dense.max_sparse_rows == 0


# ---- dReLU: the sparser view first -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "first", "second", "exchanged"),
    [(1024, 900, 100, True), (1023, 900, 100, False), (1024, 100, 900, False), (4096, 1000, 990, False)],
)
def test_the_sparser_half_goes_first_once_it_is_known(rows, first, second, exchanged):
    mlp = sparse_mlp(kind="drelu")
    before = mlp.gate_up_proj.weight.clone()
    address = mlp.gate_up_proj.weight.data_ptr()
    views = counters.new_counters(drelu=True)
    views[VIEWS, [ROWS, FIRST, SECOND]] = torch.tensor([rows, first, second])
    mlp.counters.copy_(views)
    mlp.put_sparser_view_first(views[VIEWS].tolist())
    expected = torch.cat(before.chunk(2)[::-1]) if exchanged else before
    assert torch.equal(mlp.gate_up_proj.weight, expected)
    # Captured graphs know the memory, not the parameter.
    assert mlp.gate_up_proj.weight.data_ptr() == address
    assert bool(mlp.counters[VIEWS].any()) is not exchanged


def test_layers_that_vllm_computes_keep_their_order():
    mlp = sparse_mlp(reason="lora", kind="drelu")
    before = mlp.gate_up_proj.weight.clone()
    mlp.put_sparser_view_first([4096, 900, 100, 0])
    assert torch.equal(mlp.gate_up_proj.weight, before)


# ---- row limits --------------------------------------------------------------------------------------------------------------


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
