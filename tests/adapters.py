"""LoRA adapters and quantised copies of tiny checkpoints, in the formats that vLLM loads."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_config

RANK = 4


def write_adapter(folder: Path, base: Path, modules: list[str]) -> Path:
    """Write a random adapter for some linear layers ("up_proj", …) of every decoder layer of ``base``; returns ``folder``."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        rows, columns = weight.shape
        for part, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
            values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            tensors[f"base_model.model.{module}.{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": modules,
        "bias": "none",
        "base_model_name_or_path": "",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_fp8_copy(folder: Path, base: Path, ignored: list[str]) -> Path:
    """Copy ``base`` with its linear layers in float8, one scale a matrix; those whose name starts with an ignored one stay."""
    shutil.copytree(base, folder)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or any(module.startswith(start) for start in ignored):
            tensors[name] = weight
            continue
        scale = weight.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = {name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")}
    edit_config(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "ignored_layers": sorted(name for name in names if any(name.startswith(start) for start in ignored)),
        },
    )
    return folder
