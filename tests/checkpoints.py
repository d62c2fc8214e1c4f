"""Checkpoint folders for tests: small random LLaMAs in the format the server loads."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# Every message's content, one after the other: what a model without any chat training can continue.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

TEXT = [
    "def add(first, second):\n    return first + second\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
    "for name in sorted(names):\n    if name.startswith('_'):\n        continue\n    print(name)\n",
]


def write_tiny_checkpoint(folder: Path, **config: Any) -> Path:
    """Write a random two-layer ReLU LLaMA (d_model 64, d_ff 256, 256 tokens of context) with its tokenizer.

    Args:
        folder: where to; created.
        config: overrides of the Hugging Face config's fields.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        # vLLM's CPU attention takes head sizes from 32.
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "hidden_act": "relu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **config})).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of the folder's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def write_tokenizer(folder: Path) -> int:
    """Write a small byte-level tokenizer into a folder; returns the size of its vocabulary."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXT, vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()
