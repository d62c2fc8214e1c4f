"""The load format of vLLM that fills a model with the weights of ``synthetic_model``."""

from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from sparse_backend.bench.synthetic_model import SyntheticModel, weights

LOAD_FORMAT = "prosparse_synthetic"
_MODEL = "model"


def load_arguments(model: SyntheticModel) -> dict[str, Any]:
    """What ``vllm.LLM`` is to be called with, so that it loads ``model``."""
    return {
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {_MODEL: model},
        "skip_tokenizer_init": True,
    }


@register_model_loader(LOAD_FORMAT)
class _Loader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        # Layers to be quantised while they are loaded have no memory yet; the embedding always has.
        device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
        model.load_weights(weights(self.load_config.model_loader_extra_config[_MODEL], device, model_config.dtype))
