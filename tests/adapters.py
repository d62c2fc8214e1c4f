"""LoRA adapters and quantised copies of tiny checkpoints, in the formats that vLLM loads."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_config

RANK = 4
SCALE = 2
"""What the product of an adapter's two matrices is multiplied with: lora_alpha / r."""


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
        "lora_alpha": SCALE * RANK,
        "target_modules": modules,
        "bias": "none",
        "base_model_name_or_path": "",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_int8_copy(folder: Path, base: Path, ignored: list[str]) -> Path:
    """Copy ``base`` with its linear layers in int8, one scale a row; those whose name starts with an ignored one stay."""
    shutil.copytree(base, folder)
    tensors, left_alone = {}, ["lm_head"]
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = weight
        elif any(module.startswith(start) for start in ignored):
            tensors[name] = weight
            left_alone.append(module)
        else:
            scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[f"{module}.weight_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    edit_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
            "ignore": left_alone,
        },
    )
    return folder
