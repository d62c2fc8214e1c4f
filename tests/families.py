"""Tiny checkpoints of every family: the published config's fields and tensor names, random weights, and a reference model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparse_backend.hf_configs import (
    MiniCPMConfig,
    SparseLlamaConfig,
    SparseMistralConfig,
    SparseQwen2Config,
    SparseQwen3Config,
)
from sparse_backend.prosparse import modeling
from tests.checkpoints import edit_config, write_tokenizer

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    # vLLM's CPU attention takes head sizes from 32.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    # Wide enough for gates that are neither all small nor all alike.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_RELU = {"hidden_act": "relu"}
_FATRELU = {"hidden_act": "fatrelu", "hidden_act_param": 0.01}
_MINICPM = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "tie_word_embeddings": True}
_MODEL_OF_BAMBOO = "modeling_bamboo.BambooForCausalLM"


class BambooMLP(nn.Module):
    """What PowerInfer publishes as the feed-forward layer of Bamboo: dReLU; in TurboSparse a predictor lies beside it."""

    def __init__(self, config: MistralConfig, predictor: int = 0) -> None:
        super().__init__()
        d_model, d_ff = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(layer.weight, std=config.initializer_range)
        if predictor:
            self.predictor = nn.Module()
            self.predictor.fc1 = nn.Linear(d_model, predictor, bias=False)
            self.predictor.fc2 = nn.Linear(predictor, d_ff, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x).relu())


def _with_drelu(config: MistralConfig, predictor: int = 0) -> MistralForCausalLM:
    model = MistralForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = BambooMLP(config, predictor)
    return model


def _turbo_sparse(config: MistralConfig) -> MistralForCausalLM:
    return _with_drelu(config, predictor=16)


@dataclass(frozen=True)
class TestFamily:
    """One kind of checkpoint folder."""

    __test__ = False

    reference: Callable[[Any], PreTrainedModel]
    """The Hugging Face implementation, of a config of ``config_class`` with ``fields``."""
    config_class: type[Any]
    fields: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)
    """What the published config.json says otherwise than the reference's."""
    in_class: str = "SparseLlamaForCausalLM"
    """Ours, in vLLM."""
    activation: str = "relu"


FAMILIES: dict[str, TestFamily] = {
    # SparseLLM/prosparse-llama-2-7b and -13b
    "prosparse-llama2": TestFamily(
        modeling.SparseLlamaForCausalLM,
        SparseLlamaConfig,
        _FATRELU,
        {
            "auto_map": {
                "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
                "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
            }
        },
        activation="fatrelu",
    ),
    # SparseLLM/ReluLLaMA-7B, -13B, -70B
    "relu-llama": TestFamily(LlamaForCausalLM, LlamaConfig, _RELU),
    # openbmb/MiniCPM-S-1B-sft
    "minicpm-s": TestFamily(
        modeling.MiniCPMForCausalLM,
        MiniCPMConfig,
        {**_MINICPM, "hidden_act": "fatrelu", "hidden_act_param": 0.03},
        {
            "auto_map": {
                "AutoConfig": "configuration_minicpm.MiniCPMConfig",
                "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
            }
        },
        in_class="SparseMiniCPMForCausalLM",
        activation="fatrelu",
    ),
    # openbmb/MiniCPM-S-1B-sft-llama-format
    "minicpm-s-llama-format": TestFamily(LlamaForCausalLM, LlamaConfig, {**_RELU, "tie_word_embeddings": True}),
    # PowerInfer/TurboSparse-Mistral-Instruct
    "turbosparse-mistral": TestFamily(
        _turbo_sparse,
        MistralConfig,
        _RELU,
        {
            "architectures": ["BambooForCausalLM"],
            "model_type": "bamboo",
            "auto_map": {
                "AutoConfig": "configuration_bamboo.BambooConfig",
                "AutoModelForCausalLM": _MODEL_OF_BAMBOO,
            },
        },
        in_class="SparseBambooForCausalLM",
        activation="drelu",
    ),
    # PowerInfer/Bamboo-base-v0_1
    "bamboo": TestFamily(
        _with_drelu,
        MistralConfig,
        {**_RELU, "sliding_window": 16},
        {"architectures": ["BambooForCausalLM"], "model_type": "bamboo"},
        in_class="SparseBambooForCausalLM",
        activation="drelu",
    ),
    # SakanaAI/SparseLM0.5B to 2B
    "sparselm": TestFamily(
        LlamaForCausalLM,
        LlamaConfig,
        {**_RELU, "tie_word_embeddings": True},
        {
            "architectures": ["SparseLlamaForCausalLM"],
            "model_type": "llama_sparse_relu",
            "hidden_act": "silu",
            "sparsity_gated_mlp": True,
            "sparsity_new_intermediate_size": 256,
        },
    ),
    # The offline job's exports
    "mistral": TestFamily(
        MistralForCausalLM, MistralConfig, {**_RELU, "sliding_window": 16}, in_class="SparseMistralForCausalLM"
    ),
    "sparsemistral": TestFamily(
        modeling.SparseMistralForCausalLM,
        SparseMistralConfig,
        _FATRELU,
        in_class="SparseMistralForCausalLM",
        activation="fatrelu",
    ),
    "qwen2": TestFamily(Qwen2ForCausalLM, Qwen2Config, _RELU, in_class="SparseQwen2ForCausalLM"),
    "sparseqwen2": TestFamily(
        modeling.SparseQwen2ForCausalLM,
        SparseQwen2Config,
        {**_FATRELU, "tie_word_embeddings": True},
        in_class="SparseQwen2ForCausalLM",
        activation="fatrelu",
    ),
    "qwen3": TestFamily(Qwen3ForCausalLM, Qwen3Config, {**_RELU, "head_dim": 32}, in_class="SparseQwen3ForCausalLM"),
    "sparseqwen3": TestFamily(
        modeling.SparseQwen3ForCausalLM,
        SparseQwen3Config,
        {**_FATRELU, "head_dim": 64},
        in_class="SparseQwen3ForCausalLM",
        activation="fatrelu",
    ),
    "minicpm": TestFamily(
        modeling.MiniCPMForCausalLM, MiniCPMConfig, {**_MINICPM, **_RELU}, in_class="SparseMiniCPMForCausalLM"
    ),
}


def write(folder: Path, name: str, **fields: Any) -> PreTrainedModel:
    """Write a checkpoint of the family, in bfloat16, and return the reference model with the same weights in float32.

    Args:
        folder: where to; created.
        name: one of ``FAMILIES``.
        fields: overrides of the config's.
    """
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    torch.manual_seed(sorted(FAMILIES).index(name))
    config = family.config_class(vocab_size=vocabulary, **{**_SIZES, **family.fields, **fields})
    saved = family.reference(config).to(torch.bfloat16)
    saved.save_pretrained(folder)
    edit_config(folder, **family.published)
    # Another one: bfloat16 has rounded what is no weight, too.
    model = family.reference(config).eval()
    model.load_state_dict(saved.state_dict())
    return model


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """The reference model's tokens, and the logits [tokens, vocabulary] they were chosen from."""
    sequence, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(tokens):
            logits.append(model(torch.tensor([sequence])).logits[0, -1])
            sequence.append(int(logits[-1].argmax()))
    return sequence[len(prompt) :], torch.stack(logits)
