"""The made-up models: their weights, and what a real engine makes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_backend.bench.decode import Plan, measure
from sparse_backend.bench.engine import Engine, EngineOptions
from sparse_backend.bench.synthetic_model import SHAPES, Shape, SyntheticModel, weights, write_config
from sparse_backend.checkpoint import Checkpoint

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")


def in_transformers(model: SyntheticModel, folder: Path) -> LlamaForCausalLM:
    checkpoint = write_config(folder, model.shape)
    built = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).float()
    missing, unexpected = built.load_state_dict(dict(weights(model, CPU, torch.float32)), strict=False)
    assert (missing, unexpected) == ([], [])
    return built


def measured_frequencies(model: SyntheticModel, folder: Path) -> torch.Tensor:
    """Per layer and neuron, the share of tokens of a few random sequences that activate it."""
    built = in_transformers(model, folder)
    active: list[torch.Tensor] = []
    for layer in built.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda _module, _x, gate: active.append((gate > 0).float().mean((0, 1)))
        )
    with torch.inference_mode():
        built(torch.tensor(model.prompts(16, 64)))
    return torch.stack(active)


@pytest.mark.parametrize("density", [0.0, 0.107, 0.5, 1.0])
def test_neurons_are_active_as_often_as_asked(tmp_path: Path, density: float) -> None:
    model = SyntheticModel(Shape(256, 512, 4, 2, 2, 512), density)
    measured = measured_frequencies(model, tmp_path).mean(dim=1)
    assert (measured - density).abs().max() < (0.0 if density in (0, 1) else 0.02) + 1e-6


def test_neurons_follow_the_frequencies_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "frequency.npz"
    np.savez(file, freq_all=np.array([[0.0, 0.2], [0.6, 1.0], [0.4, 0.4]], dtype=np.float16))
    model = SyntheticModel(Shape(256, 512, 4, 2, 2, 512), 0.107, file)
    wanted = torch.stack(model.layer_frequencies())
    assert wanted.unique(dim=1).shape == (4, 2 * 2 * 2)
    assert model.layer_densities() == pytest.approx(wanted.mean(dim=1).tolist())
    assert model.layer_densities() == pytest.approx([0.1, 0.8, 0.4, 0.1], abs=0.02)
    measured = measured_frequencies(model, tmp_path)
    assert (measured - wanted).abs().mean() < 0.03


def test_each_class_of_tokens_has_its_density_and_stays_itself(tmp_path: Path) -> None:
    densities = (0.02, 0.1, 0.4)
    model = SyntheticModel(Shape(256, 512, 4, 2, 2, 600), 0.0, classes=densities)
    built = in_transformers(model, tmp_path)
    shares: list[float] = []
    for layer in built.model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda _module, _x, gate: shares.append((gate > 0).float().mean().item())
        )
    for index, density in enumerate(densities):
        tokens = model.class_tokens(index)
        assert list(tokens) == list(range(200 * index, 200 * index + 200))
        shares.clear()
        with torch.inference_mode():
            logits = built(torch.tensor([list(tokens)])).logits
        assert max(abs(share - density) for share in shares) < 0.025
        assert logits.argmax(dim=2).tolist() == [[*tokens[1:], tokens[0]]]
    assert model.layer_densities() == pytest.approx([sum(densities) / 3] * 4)


def test_the_next_token_is_the_next_number(tmp_path: Path) -> None:
    model = SyntheticModel(TINY, 0.3)
    built = in_transformers(model, tmp_path)
    tokens = torch.tensor(model.prompts(4, 32))
    with torch.inference_mode():
        following = built(tokens).logits.argmax(dim=-1)
    assert torch.equal(following, (tokens + 1) % TINY.vocab_size)


def test_a_model_is_the_same_each_time() -> None:
    model = SyntheticModel(TINY, 0.3)
    first, second = (dict(weights(model, CPU, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.prompts(2, 5) == model.prompts(2, 5)
    assert model.prompts(2, 5)[0] != model.prompts(2, 5)[1]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_ones_the_kernels_take(name: str) -> None:
    shape = SHAPES[name]
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape.num_attention_heads % shape.num_key_value_heads == 0
    assert shape.hidden_size % 8 == shape.intermediate_size % 8 == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_config(tmp_path_factory.mktemp("synthetic"), TINY)


@pytest.mark.engine
def test_an_engine_runs_it(checkpoint: Checkpoint) -> None:
    model = SyntheticModel(TINY, 0.3)
    prompts = model.prompts(3, 32)
    options = EngineOptions("sparse", eager=True, synthetic=model, max_model_len=64)
    with Engine(checkpoint, options) as engine:
        engine.wait_ready()
        generations, _ = engine.generate(prompts, 8)
        snapshot = engine.snapshot()
    last = [prompt[-1] for prompt in prompts]
    wanted = [[(token + step) % TINY.vocab_size for step in range(1, 9)] for token in last]
    assert [generation.tokens for generation in generations] == wanted
    for layer in snapshot["layers"]:
        counts = layer["paths"]["sparse"]
        assert counts["rows"] == 3 * (32 + 7)
        assert counts["active"] / (counts["rows"] * layer["d_ff"]) == pytest.approx(0.3, abs=0.05)
    assert len(snapshot["layers"]) == 2


@pytest.mark.engine
def test_the_decode_benchmark_measures_it(checkpoint: Checkpoint) -> None:
    model = SyntheticModel(TINY, 0.2)
    plan = Plan(batches=[4, 1], tokens=64, rounds=1, prefill=48, eager=True, stock=True)
    report = measure(checkpoint, plan, model)
    assert [result["batch"] for result in report["decode"]] == [4, 1]
    for result in report["decode"]:
        assert result["density"] == pytest.approx(0.2, abs=0.05)
        # Rows are different tokens, and nearly independent.
        independent = 1 - (1 - result["density"]) ** result["batch"]
        assert result["union"] == pytest.approx(independent, abs=0.05)
        assert result["dense_tok_s"] > 0
        assert result["auto_tok_s"] > 0
        assert (result["stock_tok_s"] or 0) > 0
        assert result["fp8_tok_s"] is None
    prefill = report["prefill"]
    assert prefill is not None
    assert prefill["tokens"] == 48
    assert report["machine"]["device"] == "cpu"
