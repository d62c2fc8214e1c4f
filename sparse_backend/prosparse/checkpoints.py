"""Reading and writing model folders: dense bases, and ProSparse checkpoints that need no remote code."""

import importlib.metadata
import json
import math
import platform
import shutil
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_backend.activation import DENSE_ACTIVATIONS, Activation
from sparse_backend.checkpoint import TOKENIZERS, PhaseRecord, read_json
from sparse_backend.errors import UserError
from sparse_backend.hf_configs import SPARSE_CONFIGS
from sparse_backend.prosparse.modeling import SPARSE_MODELS

_TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_PRETRAINING_NAME = "pretraining.json"

_SPARSE_TYPES = {config.model_type for config in SPARSE_CONFIGS.values()} - SPARSE_CONFIGS.keys()


def check_base(folder: Path) -> str:
    """Check from its config that a folder can be made sparse, before anything is loaded.

    Returns:
        Its activation: ``hidden_act``.

    Raises:
        UserError: it is no model folder, or its feed-forward layers are not those of a known family.
    """
    config = read_json(folder, "config.json", "BASE is not a model folder: give the folder that holds it.")
    model_type, activation = config.get("model_type"), config.get("hidden_act")
    if model_type in _SPARSE_TYPES or activation == "fatrelu":
        raise UserError(
            f"BASE {str(folder)!r} went through all three steps already (model_type {model_type!r}, hidden_act"
            f" {activation!r}). Give its base."
        )
    if not isinstance(model_type, str) or model_type not in SPARSE_CONFIGS:
        raise UserError(
            f"BASE {str(folder)!r} has model_type {model_type!r}. This job knows the gated feed-forward layers of"
            f" {', '.join(SPARSE_CONFIGS)}; convert BASE to one of them if it computes the same."
        )
    if not isinstance(activation, str) or activation not in ("relu", *DENSE_ACTIVATIONS):
        raise UserError(
            f"BASE {str(folder)!r} has hidden_act {activation!r}; step 1 replaces Swish or GELU by ReLU"
            f" ({', '.join(DENSE_ACTIVATIONS)})."
        )
    if config.get("mlp_bias"):
        raise UserError(f"BASE {str(folder)!r} has mlp_bias set; feed-forward layers with biases are not supported.")
    for name in ("vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(name), int):
            raise UserError(
                f"BASE {str(folder)!r}: {name} in its config.json is {config.get(name)!r}, and must be a whole number. Copy the"
                " model again, or add what its authors give."
            )
    if config.get("quantization_config"):
        raise UserError(
            f"BASE {str(folder)!r} is quantised (quantization_config), and quantised weights cannot be trained. Give the"
            " model it was quantised from."
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"BASE {str(folder)!r} holds no *.safetensors weights; other formats can run code and are not loaded."
        )
    return activation


def load_model(folder: Path, dtype: torch.dtype, hidden_act: str | None = None) -> PreTrainedModel:
    """Load a causal model on the CPU, with another activation if ``hidden_act`` is given.

    Raises:
        UserError: the weights do not fit the config, or cannot be read.
    """
    overrides = {} if hidden_act is None else {"hidden_act": hidden_act}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **overrides
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The model in {str(folder)!r} cannot be loaded: {error}") from None
    if found["missing_keys"]:
        # transformers would go on with random values in their place.
        raise UserError(
            f"The weights in {str(folder)!r} lack {', '.join(sorted(found['missing_keys'])[:3])}, which its config asks"
            " for: they do not belong together, or a shard is missing."
        )
    return model


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model with ``vocab_size`` embeddings; None for a model that is yet to be made.

    Raises:
        UserError: there is none, or its size does not fit the model's embeddings.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder)!r} has no tokenizer that can be loaded: {error}") from None
    if vocab_size is None:
        return tokenizer
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer in {str(folder)!r} has tokens up to {largest}, the model's vocab_size is {vocab_size}: they"
            " do not belong together. Copy the tokenizer of this very model into the folder."
        )
    # Embeddings are padded to round numbers, by a few hundred at most.
    if len(tokenizer) < 0.9 * vocab_size:
        raise UserError(
            f"The tokenizer in {str(folder)!r} has {len(tokenizer)} tokens, far fewer than the {vocab_size} of the model's"
            " vocab_size: they do not belong together. Copy the tokenizer of this very model into the folder."
        )
    return tokenizer


def check_base_loss(folder: Path, loss: float, vocab_size: int) -> None:
    """Refuse a base that predicts text worse than chance: ``loss`` is in nats, and ln ``vocab_size`` is chance.

    A tokenizer of another model passes every check of its size, and shows only here.

    Raises:
        UserError: the loss is NaN, or above chance by more than untrained weights explain.
    """
    chance = math.log(vocab_size)
    if not loss <= chance + 1:
        raise UserError(
            f"BASE {str(folder)!r} has a held-out loss of {loss:.2f} on this corpus, guessing has {chance:.2f}: its tokenizer"
            " and its weights do not belong together. Copy the tokenizer of this very model into the folder."
        )


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Turn a model's weights into bfloat16, in place, and save them with the config.

    Raises:
        UserError: they cannot be written; no part of them is left.
    """
    model.config.use_cache = True  # the Trainer turns it off
    try:
        model.to(torch.bfloat16).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        raise UserError(f"The weights cannot be written to {str(folder)!r}: {error}.") from None
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)  # safetensors makes files that only their owner can read


def save_activation(folder: Path, activation: Activation) -> str:
    """Write the activation into a saved dense folder's config.json.

    ReLU leaves its family's plain folder, which stock transformers loads (MiniCPM's with our class: it has none). FATReLU
    makes it the family's sparse class, for LLaMA SparseLLM's published format, less the remote code.

    Returns:
        The architecture named in the config.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) | activation.to_hf_config()
    config.pop("auto_map", None)  # names remote code, which is not copied
    if activation.kind == "fatrelu":
        model = SPARSE_MODELS[config["model_type"]]
        config |= {"architectures": [model.__name__], "model_type": model.config_class.model_type}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config["architectures"][0]


def save_pretraining(folder: Path, phase: PhaseRecord) -> None:
    """Leave a record of how a base was trained in its folder, for the manifests of what is made from it."""
    (folder / _PRETRAINING_NAME).write_text(phase.model_dump_json(indent=1) + "\n")


def pretraining(folder: Path) -> list[PhaseRecord]:
    """The record that ``save_pretraining`` left in a base's folder; empty for a base of other origin.

    Raises:
        UserError: the file is no such record.
    """
    path = folder / _PRETRAINING_NAME
    if not path.is_file():
        return []
    content = read_json(folder, _PRETRAINING_NAME)
    try:
        return [PhaseRecord.model_validate(content)]
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(
            f"BASE: {path} is not the record that `prosparse pretrain` writes:"
            f" {'.'.join(map(str, fault['loc']))}: {fault['msg']}. Restore the file, or delete it to leave the record out."
        ) from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into a saved checkpoint, as they are where that gives the same tokenizer.

    For some folders transformers goes by ``model_type``, which the checkpoint does not share with its base, and not by the
    class that tokenizer_config.json names: then the copy names the class that the base's folder loads with.
    """
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    before, after = (type(AutoTokenizer.from_pretrained(folder, local_files_only=True)) for folder in (source, target))
    if before is not after:
        path = target / "tokenizer_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(settings | {"tokenizer_class": before.__name__}, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for name in ("prosparse-serve", "torch", "transformers", "accelerate", "tokenizers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
