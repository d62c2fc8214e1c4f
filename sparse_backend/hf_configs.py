"""Config classes for checkpoints whose ``model_type`` transformers does not know, so that none needs remote code."""

from transformers import AutoConfig, LlamaConfig


class SparseLlamaConfig(LlamaConfig):
    """LLaMA with a FATReLU gate, as SparseLLM publishes its ProSparse models.

    ``hidden_act`` is "fatrelu" and ``hidden_act_param`` its threshold; see ``sparse_backend.activation``.
    """

    model_type = "sparsellama"

    hidden_act: str = "fatrelu"
    hidden_act_param: float = 0.0


def register() -> None:
    """Let ``AutoConfig`` read ``model_type: sparsellama``. Idempotent."""
    AutoConfig.register(SparseLlamaConfig.model_type, SparseLlamaConfig, exist_ok=True)
