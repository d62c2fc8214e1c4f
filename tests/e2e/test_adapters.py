"""A LoRA adapter over HTTP: it is listed, answers under its own name, and leaves the base model's answers alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests import families
from tests.adapters import SCALE, write_adapter
from tests.e2e import greedy
from tests.e2e.servers import Server

pytestmark = pytest.mark.engine

PROMPTS = [[5, 6, 7, 8], [40, 41, 42]]
MODULES = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


class Running(NamedTuple):
    server: Server
    expected: dict[str, list[list[int]]]
    """Tokens by the name a request gives as its model, from Hugging Face's implementation."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("adapters")
    model = families.write(root / "model", "relu-llama")
    adapter = write_adapter(root / "adapter", root / "model", MODULES)
    expected = {"model": [greedy.from_model(model, prompt) for prompt in PROMPTS]}
    merge(model, adapter)
    expected["tuned"] = [greedy.from_model(model, prompt) for prompt in PROMPTS]
    server = Server(
        root / "model",
        root / "log",
        *("--dtype", "float32", "--ffn-path", "sparse", "--"),
        *("--max-num-seqs", "8", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8"),
        *("--lora-modules", f"tuned={adapter}"),
    )
    try:
        server.wait_ready()
        yield Running(server, expected)
    finally:
        server.close()


def merge(model: torch.nn.Module, adapter: Path) -> None:
    """Add the adapter to the weights."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in model.named_parameters():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            update = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            weight.data += SCALE * update.to(weight.dtype)


def test_it_is_listed_beside_the_model(running: Running) -> None:
    assert {entry["id"] for entry in running.server.get("/v1/models").json()["data"]} == {"model", "tuned"}


def test_each_name_answers_with_its_own_weights(running: Running) -> None:
    assert running.expected["model"] != running.expected["tuned"]
    for name in ("model", "tuned", "model"):
        assert [greedy.from_server(running.server, prompt, name) for prompt in PROMPTS] == running.expected[name]


def test_a_name_that_nobody_has_is_refused(running: Running) -> None:
    response = running.server.post("/v1/completions", {"model": "other", "prompt": [5], "max_tokens": 1})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFoundError"


def test_layers_that_may_have_an_adapter_are_shown_as_dense(running: Running) -> None:
    metrics = running.server.metrics_of_now()
    for layer in ("0", "1"):
        assert metrics["sparse_ffn_dense_fallback", frozenset({"layer": layer, "reason": "lora"}.items())] == 1
        assert metrics["sparse_ffn_rows_total", frozenset({"layer": layer, "path": "sparse"}.items())] == 0
        assert metrics["sparse_ffn_rows_total", frozenset({"layer": layer, "path": "dense"}.items())] > 0
