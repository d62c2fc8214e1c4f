"""Small random models for this room's tests."""

from typing import Any

import torch
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

from sparse_backend.hf_configs import MiniCPMConfig
from sparse_backend.prosparse.modeling import MiniCPMForCausalLM

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "hidden_act": "relu",
    # Wide enough for gates that are neither all small nor all alike.
    "initializer_range": 0.2,
}

# By model_type: the dense model's class, its config's class, and what makes the family differ from LLaMA.
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
    "minicpm": (MiniCPMForCausalLM, MiniCPMConfig, {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}),
}


def random_llama(**config: Any) -> LlamaForCausalLM:
    """A two-layer ReLU LLaMA in float32: d_model 32, d_ff 48, vocabulary 64."""
    return random_model("llama", **config)


def random_model(model_type: str, **config: Any) -> PreTrainedModel:
    """The same for another family of gated models."""
    model, config_class, own = _FAMILIES[model_type]
    torch.manual_seed(0)
    return model(config_class(**{**_SIZES, **own, **config}))


def random_tokens(sequences: int, context: int) -> torch.Tensor:
    """Token ids below 64, int64 [sequences, context]."""
    return torch.randint(64, (sequences, context), generator=torch.Generator().manual_seed(1))
