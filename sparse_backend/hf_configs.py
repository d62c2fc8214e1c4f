"""Config classes for checkpoints whose ``model_type`` transformers does not know, so that none needs remote code.

A sparse class is its dense family's with two fields read by ``sparse_backend.activation``: ``hidden_act`` is "fatrelu" and
``hidden_act_param`` its threshold.
"""

import math
from typing import Any

from transformers import (
    AutoConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)


class SparseLlamaConfig(LlamaConfig):
    """LLaMA with a FATReLU gate, as SparseLLM publishes its ProSparse models."""

    model_type = "sparsellama"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseMistralConfig(MistralConfig):
    """Mistral with a FATReLU gate."""

    model_type = "sparsemistral"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseQwen2Config(Qwen2Config):
    """Qwen2 with a FATReLU gate."""

    model_type = "sparseqwen2"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseQwen3Config(Qwen3Config):
    """Qwen3 with a FATReLU gate."""

    model_type = "sparseqwen3"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0


class SparseLMConfig(LlamaConfig):
    """LLaMA with a ReLU gate, as SakanaAI publishes its SparseLM models; their class ignores ``hidden_act``."""

    model_type = "llama_sparse_relu"

    hidden_act: str = "relu"


class BambooConfig(MistralConfig):
    """Mistral with dReLU, as PowerInfer publishes Bamboo and TurboSparse-Mistral: ``hidden_act`` is that of gate and of up."""

    model_type = "bamboo"

    hidden_act: str = "relu"


class MiniCPMConfig(GraniteConfig):
    """MiniCPM (arXiv 2404.06395), dense or sparse under one name: OpenBMB publishes MiniCPM-S with "fatrelu" in this config.

    Its three scales are LLaMA's extensions that Granite has under other names, of which it is computed here.
    """

    model_type = "minicpm"

    hidden_act_param: float = 0.0
    scale_emb: float | int = 1
    scale_depth: float | int = 1
    dim_model_base: float | int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        self.embedding_multiplier = self.scale_emb
        self.residual_multiplier = self.scale_depth / math.sqrt(self.num_hidden_layers)
        self.logits_scaling = self.hidden_size / self.dim_model_base
        self.attention_multiplier = (self.hidden_size // self.num_attention_heads) ** -0.5
        super().__post_init__(**kwargs)


# By the model_type of the dense family.
SPARSE_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    LlamaConfig.model_type: SparseLlamaConfig,
    MistralConfig.model_type: SparseMistralConfig,
    Qwen2Config.model_type: SparseQwen2Config,
    Qwen3Config.model_type: SparseQwen3Config,
    MiniCPMConfig.model_type: MiniCPMConfig,
}


def register() -> None:
    """Let ``AutoConfig`` read their model types. Idempotent."""
    configs: tuple[type[PreTrainedConfig], ...] = (*SPARSE_CONFIGS.values(), SparseLMConfig, BambooConfig)
    for config in configs:
        AutoConfig.register(config.model_type, config, exist_ok=True)
