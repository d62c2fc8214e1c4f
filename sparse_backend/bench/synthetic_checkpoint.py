"""A made-up model as a checkpoint folder that any server can load: weights in shards, and a tokenizer with a word per token."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_backend.bench.synthetic_model import SyntheticModel, weights, write_config
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError

_SHARD_BYTES = 1 << 30
_NOTE = "synthetic.json"


def write_checkpoint(folder: Path, model: SyntheticModel) -> Checkpoint:
    """Write the folder in bfloat16, or take it as it is if this model is in it. A 7B model takes 13.5 GB.

    Raises:
        UserError: something else is in the folder.
    """
    made_from = json.dumps(asdict(model))
    note = folder / _NOTE
    if note.exists() and note.read_text() == made_from:
        return Checkpoint.open(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--folder {folder} holds something else than this model. Empty it, or name another.")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, model.shape)
    _write_tokenizer(folder, model.shape.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _write_weights(folder, model, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    note.write_text(made_from)
    return Checkpoint.open(folder)


def _write_weights(folder: Path, model: SyntheticModel, device: torch.device) -> None:
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    total = size = shards = 0

    def write() -> None:
        nonlocal shards, size
        name = f"model-{shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()
        shards, size = shards + 1, 0

    for name, tensor in weights(model, device, torch.bfloat16):
        # A copy of its own each: safetensors refuses two names for the same memory.
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= _SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    words = [f"t{index}" for index in range(vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
