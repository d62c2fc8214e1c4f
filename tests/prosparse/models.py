"""Small random models for this room's tests."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(**config: Any) -> LlamaForCausalLM:
    """A two-layer ReLU LLaMA in float32: d_model 32, d_ff 48, vocabulary 64."""
    torch.manual_seed(0)
    fields = {
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
    return LlamaForCausalLM(LlamaConfig(**{**fields, **config}))


def random_tokens(sequences: int, context: int) -> torch.Tensor:
    """Token ids below 64, int64 [sequences, context]."""
    return torch.randint(64, (sequences, context), generator=torch.Generator().manual_seed(1))
