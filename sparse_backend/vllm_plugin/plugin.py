"""What vLLM runs at the start of every one of its processes (entry point group ``vllm.general_plugins``)."""

import torch
from vllm import ModelRegistry
from vllm.platforms import current_platform

from sparse_backend import hf_configs
from sparse_backend.families import MODEL_CLASSES
from sparse_backend.vllm_plugin.waiting import forget_notifications, sleep_while_waiting


def register() -> None:
    """Make our configs and model classes known to vLLM. Idempotent: vLLM calls it in the API, engine and worker processes."""
    hf_configs.register()
    # The string form keeps this process from importing model code (and CUDA) that only the worker needs.
    for name in MODEL_CLASSES:
        ModelRegistry.register_model(name, f"sparse_backend.vllm_plugin.models:{name}")
    _allow_amx_tiles()
    forget_notifications()
    if current_platform.is_cpu():
        sleep_while_waiting()


def _allow_amx_tiles() -> None:
    """Ask the Linux kernel for the AMX tile permission of this process.

    vLLM's bf16 CPU attention picks AMX from CPUID alone and dies with SIGILL in a process that never asked.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
