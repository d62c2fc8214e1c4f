"""Prompts for the benchmarks: text of documents that the checkpoint's training never saw."""

import random
from pathlib import Path

from transformers import AutoTokenizer

from sparse_backend import hf_configs
from sparse_backend.prosparse.corpus import held_out_documents


def held_out_prompts(folder: Path, corpus: str, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """``count`` stretches of ``length`` token ids, each from a place drawn at random in the corpus' held-out documents.

    Raises:
        UserError: the corpus cannot be read.
        ValueError: its held-out documents hold no stretch of ``length`` tokens.
    """
    hf_configs.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = random.Random(seed)  # noqa: S311 - reproducible sampling, nothing secret
    documents = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in held_out_documents(corpus)
    ]
    documents = [tokens for tokens in documents if len(tokens) >= length]
    if not documents:
        raise ValueError(f"no held-out document of {corpus!r} is {length} tokens long")
    prompts = []
    for tokens in generator.choices(documents, k=count):
        start = generator.randrange(len(tokens) - length + 1)
        prompts.append(tokens[start : start + length])
    return prompts
