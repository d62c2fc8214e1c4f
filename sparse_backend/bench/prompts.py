"""Prompts for the benchmarks: text of documents that the checkpoint's training never saw."""

import random
from pathlib import Path

from transformers import AutoTokenizer

from sparse_backend import hf_configs
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.prosparse.corpus import held_out_documents

PROMPT_TOKENS = 32
"""Length of the prompts of benchmarks that generate."""


def check_context(checkpoint: Checkpoint, tokens: int) -> None:
    """Refuse to generate ``tokens`` tokens that do not fit behind a prompt of ``PROMPT_TOKENS``.

    Raises:
        UserError: the model's context is too short.
    """
    if PROMPT_TOKENS + tokens > checkpoint.context_length:
        raise UserError(
            f"--tokens is too large: {PROMPT_TOKENS} tokens of prompt and {tokens} generated ones exceed the model's context"
            f" of {checkpoint.context_length} tokens."
        )


def held_out_prompts(folder: Path, corpus: str, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """``count`` stretches of ``length`` token ids, each from a place drawn at random in the corpus' held-out documents.

    Raises:
        UserError: the corpus cannot be read, or its held-out documents hold no stretch of ``length`` tokens.
    """
    hf_configs.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = random.Random(seed)  # noqa: S311 - reproducible sampling, nothing secret
    documents = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in held_out_documents(corpus)
    ]
    documents = [tokens for tokens in documents if len(tokens) >= length]
    if not documents:
        raise UserError(f"--corpus: no held-out document of {corpus} is {length} tokens long. Add longer documents.")
    prompts = []
    for tokens in generator.choices(documents, k=count):
        start = generator.randrange(len(tokens) - length + 1)
        prompts.append(tokens[start : start + length])
    return prompts
