"""The checkpoints' model for transformers: LLaMA whose gate activation is FATReLU."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparse_backend import hf_configs
from sparse_backend.activation import Activation
from sparse_backend.hf_configs import SparseLlamaConfig


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


class SparseLlamaForCausalLM(LlamaForCausalLM):
    """``LlamaForCausalLM`` with FATReLU feed-forward layers.

    Raises:
        UserError: the config's activation or threshold cannot be used.
    """

    config_class = SparseLlamaConfig

    def __init__(self, config: SparseLlamaConfig) -> None:
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
        for layer in self.model.layers:
            layer.mlp.act_fn = FatReLU(activation.threshold)


def register() -> None:
    """Let ``AutoModelForCausalLM`` load ``sparsellama`` folders. Idempotent."""
    hf_configs.register()
    AutoModelForCausalLM.register(SparseLlamaConfig, SparseLlamaForCausalLM, exist_ok=True)
