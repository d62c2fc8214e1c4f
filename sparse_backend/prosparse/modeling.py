"""The checkpoints' models for transformers: those of known families, with FATReLU as the gate's activation."""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from sparse_backend import hf_configs
from sparse_backend.activation import Activation
from sparse_backend.hf_configs import (
    MiniCPMConfig,
    SparseLlamaConfig,
    SparseMistralConfig,
    SparseQwen2Config,
    SparseQwen3Config,
)
from sparse_backend.prosparse.gated_ffn import gated_ffns


class FatReLU(nn.Module):
    """Pass values above the threshold and zero the others, in the input's dtype (ProSparse eq. 3); NaN passes.

    The comparison is strict and in float32, whatever the dtype: see ``sparse_backend.activation``.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, gate: Tensor) -> Tensor:
        """``gate`` of any shape -> the same shape and dtype."""
        return gate.masked_fill(gate.to(torch.float32) <= self.threshold, 0)


class _FatReLUModel(PreTrainedModel):
    """What makes a dense family's model sparse: mixed in before its class.

    Raises:
        UserError: the config's activation or threshold cannot be used.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        activation = Activation.from_hf_config(
            {"hidden_act": config.hidden_act, "hidden_act_param": config.hidden_act_param}
        )
        # transformers builds each layer's activation from a table of names that lacks this one. Every layer keeps a
        # reference to this config object, so a copy with another name would not do.
        hidden_act, config.hidden_act = config.hidden_act, "relu"
        try:
            super().__init__(config)
        finally:
            config.hidden_act = hidden_act
        for ffn in gated_ffns(self):
            ffn.act_fn = FatReLU(activation.threshold)


class SparseLlamaForCausalLM(_FatReLUModel, LlamaForCausalLM):
    """``LlamaForCausalLM`` with FATReLU feed-forward layers."""

    config_class = SparseLlamaConfig


class SparseMistralForCausalLM(_FatReLUModel, MistralForCausalLM):
    """``MistralForCausalLM`` with FATReLU feed-forward layers."""

    config_class = SparseMistralConfig


class SparseQwen2ForCausalLM(_FatReLUModel, Qwen2ForCausalLM):
    """``Qwen2ForCausalLM`` with FATReLU feed-forward layers."""

    config_class = SparseQwen2Config


class SparseQwen3ForCausalLM(_FatReLUModel, Qwen3ForCausalLM):
    """``Qwen3ForCausalLM`` with FATReLU feed-forward layers."""

    config_class = SparseQwen3Config


class MiniCPMForCausalLM(_FatReLUModel, GraniteForCausalLM):
    """MiniCPM, dense or sparse: Granite's network with MiniCPM's scales, its activation any of transformers' or FATReLU."""

    config_class = MiniCPMConfig

    def __init__(self, config: MiniCPMConfig) -> None:
        if config.hidden_act == "fatrelu":
            super().__init__(config)
        else:
            super(_FatReLUModel, self).__init__(config)


# By the model_type of the dense family, as in hf_configs.SPARSE_CONFIGS.
SPARSE_MODELS: dict[str, type[_FatReLUModel]] = {
    "llama": SparseLlamaForCausalLM,
    "mistral": SparseMistralForCausalLM,
    "qwen2": SparseQwen2ForCausalLM,
    "qwen3": SparseQwen3ForCausalLM,
    "minicpm": MiniCPMForCausalLM,
}


def register() -> None:
    """Let ``AutoModelForCausalLM`` load sparse folders, and MiniCPM's without their remote code. Idempotent."""
    hf_configs.register()
    for model in SPARSE_MODELS.values():
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
