"""Up to how many rows each layer takes the sparse path: our setting ``ffn_path``, resolved against the measured table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.platforms import current_platform

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.ffn import native, paths
from sparse_backend.vllm_plugin.cost import LayerTable
from sparse_backend.vllm_plugin.snapshot import KernelRecord


class PluginSettings(BaseModel):
    """What reaches the plugin through vLLM's ``additional_config["prosparse"]``."""

    model_config = ConfigDict(extra="forbid")

    ffn_path: Literal["auto", "sparse", "dense"] = "auto"
    max_sparse_rows: list[int] | None = None
    """Per layer; filled in by the first model that resolves ``ffn_path``."""
    densities: list[float] | None = None
    """Per layer, what "auto" goes by; None takes those the checkpoint's manifest tells."""
    count_rows: bool = False
    """Count the active neurons of each row for our scheduler, which must be in use."""


def plugin_settings(vllm_config: VllmConfig) -> PluginSettings:
    """Our part of the configuration."""
    additional = cast(dict[str, object], vllm_config.additional_config)
    return PluginSettings.model_validate(additional.get("prosparse", {}))


def max_sparse_rows_per_layer(vllm_config: VllmConfig) -> list[int]:
    """Resolve ``ffn_path`` to one row limit per decoder layer, once per process.

    The limits end up as constants in compiled graphs. They are written back into ``additional_config``, which is part of vLLM's
    compilation cache key: a table that was measured anew must not meet a graph compiled for the old one.
    """
    settings = plugin_settings(vllm_config)
    if settings.max_sparse_rows is None:
        settings.max_sparse_rows = _resolve(vllm_config, settings)
        cast(dict[str, object], vllm_config.additional_config)["prosparse"] = settings.model_dump()
    return settings.max_sparse_rows


def kernel_record(device_type: str, dtype: torch.dtype, d_model: int) -> KernelRecord:
    """Which implementation computes the layers of a model, and why not on the sparse path where there is none for it."""
    kernel = native.kernel_info(device_type)
    reason = kernel.reason
    if not reason and paths.largest_sparse_rows(dtype, d_model, device_type) == 0:
        name = str(dtype).removeprefix("torch.")
        reason = f"no sparse {device_type} kernels for {name} and d_model {d_model}, every layer is computed densely"
    return {"name": kernel.name, "isa": kernel.isa, "reason": reason}


def _resolve(vllm_config: VllmConfig, settings: PluginSettings) -> list[int]:
    model, device_type = vllm_config.model_config, current_platform.device_type
    d_model: int = model.hf_config.hidden_size
    n_layers: int = model.hf_config.num_hidden_layers
    # Asked for also where it changes nothing: it loads the kernels, which must not happen while a CUDA graph is captured.
    kernel = kernel_record(device_type, model.dtype, d_model)
    if settings.ffn_path == "dense" or kernel["reason"]:
        return [paths.ALWAYS_DENSE] * n_layers
    if settings.ffn_path == "sparse":
        return [paths.largest_sparse_rows(model.dtype, d_model, device_type)] * n_layers
    densities: Sequence[float | None] | None = settings.densities
    if densities is None and (folder := Path(model.model)).is_dir():
        densities = Checkpoint.open(folder, verify=False).layer_densities
    d_ff = model.hf_config.intermediate_size // get_tensor_model_parallel_world_size()
    return [
        paths.max_sparse_rows(model.dtype, d_model, d_ff, density, device_type)
        for density in densities or [None] * n_layers
    ]


def layer_table(vllm_config: VllmConfig) -> LayerTable:
    """What ``ffn_path`` auto went by; empty with another setting, for which nothing was measured."""
    model, device_type = vllm_config.model_config, current_platform.device_type
    d_model: int = model.hf_config.hidden_size
    automatic = plugin_settings(vllm_config).ffn_path == "auto"
    if not automatic or paths.largest_sparse_rows(model.dtype, d_model, device_type) == 0:
        return LayerTable([], [])
    d_ff = model.hf_config.intermediate_size // get_tensor_model_parallel_world_size()
    return LayerTable.of(paths.path_table(model.dtype, d_model, d_ff, device_type).timings)
