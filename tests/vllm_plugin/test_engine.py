"""Our model class inside a real vLLM engine, against transformers and against itself on the other path."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_backend.bench import parity
from sparse_backend.bench.engine import Engine, EngineOptions
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.prosparse import modeling
from tests.checkpoints import write_tiny_checkpoint

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def greedy_in_transformers(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    modeling.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def test_a_relu_llama_is_mapped_to_our_class_and_gives_the_tokens_of_transformers(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "relu-llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prompts = [[5, 6, 7, 8], [40, 41, 42]]
    with Engine(Checkpoint.open(folder), EngineOptions("sparse", dtype="float32", eager=True)) as engine:
        engine.wait_ready()
        generations, _ = engine.generate(prompts, 12)
        snapshot = engine.snapshot()
    assert [generation.tokens for generation in generations] == [
        greedy_in_transformers(folder, prompt, 12) for prompt in prompts
    ]
    # 4 + 3 prompt rows in the prefill, then one row per sequence and step; the last token is never fed back.
    for layer in snapshot["layers"]:
        assert layer["paths"]["sparse"]["rows"] == 7 + 2 * 11
        assert layer["paths"]["dense"]["rows"] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_demo_gives_the_tokens_of_transformers():
    prompts = [[5, 60, 700], [40, 41, 42, 43, 44]]
    with Engine(Checkpoint.open(DEMO), EngineOptions("auto", dtype="float32", eager=True)) as engine:
        engine.wait_ready()
        generations, _ = engine.generate(prompts, 16)
    assert [generation.tokens for generation in generations] == [
        greedy_in_transformers(DEMO, prompt, 16) for prompt in prompts
    ]


def test_both_paths_give_the_demos_tokens_and_count_what_they_say():
    result = parity.compare(Checkpoint.open(DEMO), prompts=6, tokens=24, tolerance=1e-4, corpus="stdlib")
    assert result["ok"], result
    for path, recounts in result["layers"].items():
        for layer in recounts:
            assert layer["counters"]["rows"] == 6 * 32 + 6 * 23, path
            assert 0.01 < layer["counters"]["active"] / (layer["counters"]["rows"] * 768) < 0.3, path
