"""Up to how many rows each layer takes the sparse path: our setting ``ffn_path``, resolved against the measured table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.platforms import current_platform

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.ffn import native, paths


class PluginSettings(BaseModel):
    """What reaches the plugin through vLLM's ``additional_config["prosparse"]``."""

    model_config = ConfigDict(extra="forbid")

    ffn_path: Literal["auto", "sparse", "dense"] = "auto"
    max_sparse_rows: list[int] | None = None
    """Per layer; filled in by the first model that resolves ``ffn_path``."""


def max_sparse_rows_per_layer(vllm_config: VllmConfig) -> list[int]:
    """Resolve ``ffn_path`` to one row limit per decoder layer, once per process.

    The limits end up as constants in compiled graphs. They are written back into ``additional_config``, which is part of vLLM's
    compilation cache key: a table that was measured anew must not meet a graph compiled for the old one.
    """
    additional = cast(dict[str, object], vllm_config.additional_config)
    settings = PluginSettings.model_validate(additional.get("prosparse", {}))
    if settings.max_sparse_rows is None:
        settings.max_sparse_rows = _resolve(vllm_config, settings.ffn_path)
        additional["prosparse"] = settings.model_dump()
    return settings.max_sparse_rows


def _resolve(vllm_config: VllmConfig, ffn_path: Literal["auto", "sparse", "dense"]) -> list[int]:
    config = vllm_config.model_config.hf_config
    n_layers: int = config.num_hidden_layers
    if ffn_path == "dense" or native.kernel_info(current_platform.device_type).name == "reference":
        return [paths.ALWAYS_DENSE] * n_layers
    if ffn_path == "sparse":
        return [paths.ALWAYS_SPARSE] * n_layers
    densities: Sequence[float | None] = [None] * n_layers
    folder = Path(vllm_config.model_config.model)
    if folder.is_dir():
        densities = Checkpoint.open(folder, verify=False).layer_densities or densities
    d_ff = config.intermediate_size // get_tensor_model_parallel_world_size()
    return [
        paths.max_sparse_rows(vllm_config.model_config.dtype, config.hidden_size, d_ff, density)
        for density in densities
    ]
