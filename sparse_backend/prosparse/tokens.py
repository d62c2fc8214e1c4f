"""From text to training input: a byte-level BPE tokenizer for code, token streams, and windows of tokens."""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Self

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_backend.errors import UserError
from sparse_backend.prosparse.corpus import Corpus

_TOKENIZED_AT_ONCE = 1024  # documents

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# A newline and an indentation are tokens of their own, so that a prompt may end after either and still look like text
# the model was trained on. Identifiers keep their underscores and a single space before them.
_PIECES = Regex(r"\n| {2,}|\t+| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s")

# A base model continues text: a conversation is the text of its messages, one after the other.
_CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ '\\n' }}{% endfor %}"


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that gives back every text exactly.

    Args:
        texts: documents to learn the merges from.
        vocab_size: entries including the 256 bytes and the three special tokens.
        context: the model's longest sequence, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """All documents' tokens, each document between BOS and EOS where the tokenizer has them: int32 [tokens]."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = array("i")  # a list of Python's numbers would take eight times the memory
    for begin in range(0, len(texts), _TOKENIZED_AT_ONCE):
        encoded = tokenizer(
            texts[begin : begin + _TOKENIZED_AT_ONCE],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            stream.extend(chain(before, ids, after))
    return torch.tensor(stream, dtype=torch.int32)


class TokenWindows(Dataset[Tensor]):
    """Windows of ``context`` tokens from a stream; each pass over the stream starts at another offset.

    The order is fixed by the seed at construction, so sample ``i`` is the same in every run and after every resumption.
    """

    def __init__(self, stream: Tensor, context: int, samples: int, seed: int) -> None:
        self._stream = stream
        self._within = torch.arange(context)
        generator = torch.Generator().manual_seed(seed)
        # As many as fit behind the largest offset, so that every pass has the same number of windows.
        windows = (len(stream) - context + 1) // context
        passes = []
        for _ in range(-(-samples // windows)):
            offset = int(torch.randint(context, (), generator=generator))
            passes.append(offset + context * torch.randperm(windows, generator=generator))
        self._starts = torch.cat(passes)[:samples]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A whole batch in one gather, int64 [len(indices), context]; the DataLoader prefers this to single items."""
        return self._stream[self._starts[indices, None] + self._within].to(torch.int64)


class MixedWindows(Dataset[Tensor]):
    """Windows of several streams, taken in turn so that every stretch holds each stream in proportion to its share.

    The order is fixed at construction, and a longer run goes through the same windows first.
    """

    def __init__(
        self, streams: Sequence[Tensor], shares: Sequence[float], context: int, samples: int, seed: int
    ) -> None:
        self._context = context
        counts = [math.ceil(samples * share) + 1 for share in shares]
        self._windows = [
            TokenWindows(stream, context, count, seed) for stream, count in zip(streams, counts, strict=True)
        ]
        # The k-th window of a stream is due at (k + 1/2) / share, counted in windows of all streams.
        due = torch.cat(
            [(torch.arange(count) + 0.5).double() / share for count, share in zip(counts, shares, strict=True)]
        )
        order = due.argsort(stable=True)[:samples]
        self._stream = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[order]
        self._index = torch.cat([torch.arange(count) for count in counts])[order]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[int(self._stream[index])][int(self._index[index])]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """A whole batch in one gather a stream, int64 [len(indices), context]."""
        streams, windows = self._stream[indices], self._index[indices]
        batch = torch.empty(len(indices), self._context, dtype=torch.int64)
        for number, source in enumerate(self._windows):
            of_source = streams == number
            batch[of_source] = source.__getitems__(windows[of_source].tolist())
        return batch


class HeldOutBlocks(Dataset[Tensor]):
    """A stream cut into consecutive blocks of ``context`` tokens; a shorter rest is left out."""

    def __init__(self, stream: Tensor, context: int) -> None:
        self.blocks = stream[: len(stream) // context * context].view(-1, context).to(torch.int64)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks[index]

    @classmethod
    def joined(cls, parts: Sequence["HeldOutBlocks"]) -> Self:
        """The blocks of several streams, none of which crosses from one into the next."""
        blocks = torch.cat([part.blocks for part in parts])
        return cls(blocks.flatten(), blocks.shape[1])

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches of up to ``size`` blocks, in order: int64 [<= size, context]."""
        return iter(self.blocks.split(size))


@dataclass(frozen=True)
class DomainText:
    """One domain of a corpus in tokens."""

    name: str
    stream: Tensor
    """Training tokens, int32 [tokens]."""
    held_out: HeldOutBlocks
    weight: float | None = None
    """Share of the windows to train on, relative to the other domains'; None for the length of its stream."""


@dataclass(frozen=True)
class Text:
    """What a model is trained and measured on."""

    domains: tuple[DomainText, ...]

    @property
    def train_tokens(self) -> int:
        """Training tokens of all domains, each counted once."""
        return sum(len(domain.stream) for domain in self.domains)

    @cached_property
    def held_out(self) -> HeldOutBlocks:
        """The held-out blocks of all domains, one domain after the other."""
        return HeldOutBlocks.joined([domain.held_out for domain in self.domains])

    @property
    def shares(self) -> list[float]:
        """Per domain, its share of the windows."""
        weights = [len(domain.stream) if domain.weight is None else domain.weight for domain in self.domains]
        return [weight / sum(weights) for weight in weights]

    def windows(self, context: int, samples: int, seed: int) -> Dataset[Tensor]:
        """``samples`` training windows of ``context`` tokens, in an order fixed by the seed."""
        if len(self.domains) == 1:
            return TokenWindows(self.domains[0].stream, context, samples, seed)
        return MixedWindows([domain.stream for domain in self.domains], self.shares, context, samples, seed)


def read_text(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int) -> Text:
    """Tokenize both sides of the corpus' split.

    Raises:
        UserError: one of them is too short for sequences of ``context`` tokens, in one of the domains.
    """
    domains = []
    for domain in corpus.domains:
        stream = token_stream(tokenizer, domain.training)
        held_out = HeldOutBlocks(token_stream(tokenizer, domain.held_out), context)
        print(
            f"corpus: {domain.name}, {len(domain.documents)} documents, {len(domain.held_out)} held out;"
            f" {len(stream):,} training tokens, {held_out.blocks.numel():,} held-out tokens",
            flush=True,
        )
        if len(stream) < 2 * context or not len(held_out):
            raise UserError(
                f"Corpus {domain.name!r} has {len(stream)} training tokens and {len(held_out)} held-out sequences of"
                f" --context {context} tokens; at least two sequences and one are needed. Add text or take a shorter context."
            )
        domains.append(DomainText(domain.name, stream, held_out, domain.weight))
    return Text(tuple(domains))


def as_model_input(batch: Any) -> dict[str, Tensor]:
    """Collate windows into what a causal model takes: the labels are the inputs (the model shifts them)."""
    tokens = batch if isinstance(batch, Tensor) else torch.stack(batch)
    return {"input_ids": tokens, "labels": tokens}
