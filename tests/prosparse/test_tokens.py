from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sparse_backend.errors import UserError
from sparse_backend.prosparse.corpus import read_corpus
from sparse_backend.prosparse.tokens import (
    DomainText,
    HeldOutBlocks,
    Text,
    TokenWindows,
    as_model_input,
    read_text,
    token_stream,
    train_tokenizer,
)
from tests.prosparse.corpora import write_corpus


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    corpus = read_corpus(str(write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")))
    return train_tokenizer(corpus.training, vocab_size=400, context=128)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n\r_(:=é0")), max_size=60))
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_newline_and_indentation_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "def f(count):\n        return count"
    pieces = [tokenizer.decode([token]) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "\n" in pieces
    assert pieces[pieces.index("\n") + 1] == "        "
    # So a prompt that ends at either is a prefix of the whole text's tokens.
    whole = tokenizer(text)["input_ids"]
    for end in (text.index("\n") + 1, text.index("return")):
        prefix = tokenizer(text[:end])["input_ids"]
        assert whole[: len(prefix)] == prefix


def test_survives_a_model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # transformers rebuilds some tokenizers by the model's type: beside a llama config this one must stay what it is.
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return  x_1 + 12345\n\n\tpass"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_chat_reads_as_the_messages_text_after_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def f():"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>import os\ndef f():\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[1:] == tokenizer("import os\ndef f():\n", add_special_tokens=False)["input_ids"]


def test_stream_puts_each_document_between_bos_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = token_stream(tokenizer, ["return total", "value"])
    assert stream.dtype == torch.int32
    assert tokenizer.decode(stream) == "<|bos|>return total<|eos|><|bos|>value<|eos|>"


def test_windows_cover_each_pass_once_and_start_each_elsewhere() -> None:
    windows = TokenWindows(torch.arange(1000, dtype=torch.int32), context=10, samples=297, seed=0)
    tokens = torch.stack([windows[index] for index in range(len(windows))])
    assert tokens.shape == (297, 10)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(10))
    offsets = set()
    for one_pass in tokens.split(99):
        starts = one_pass[:, 0]
        offsets.add(int(starts[0]) % 10)
        assert len(starts.unique()) == 99
        assert len((starts % 10).unique()) == 1
        assert starts.diff().abs().max() > 10
    assert len(offsets) > 1


def test_windows_are_fixed_by_the_seed() -> None:
    stream = torch.arange(500, dtype=torch.int32)
    one, same, other = (TokenWindows(stream, 16, 100, seed) for seed in (1, 1, 2))
    whole = list(range(100))
    assert torch.equal(one.__getitems__(whole), same.__getitems__(whole))
    assert not torch.equal(one.__getitems__(whole), other.__getitems__(whole))
    # A longer run goes through the same windows first.
    assert torch.equal(TokenWindows(stream, 16, 300, 1).__getitems__(whole), one.__getitems__(whole))


@pytest.mark.parametrize("length", [20, 21, 29, 30, 31])
def test_shortest_streams_stay_within_bounds(length: int) -> None:
    windows = TokenWindows(torch.arange(length, dtype=torch.int32), context=10, samples=200, seed=3)
    tokens = windows.__getitems__(list(range(200)))
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < length


def mixture(*weights: float | None) -> Text:
    """Two domains: 100 tokens below 1,000, and 900 tokens from 1,000 on."""
    streams = torch.arange(100, dtype=torch.int32), torch.arange(1000, 1900, dtype=torch.int32)
    return Text(
        tuple(
            DomainText(f"domain {number}", stream, HeldOutBlocks(stream[:25], 10), weight)
            for number, (stream, weight) in enumerate(zip(streams, weights, strict=True))
        )
    )


@pytest.mark.parametrize(("weights", "share"), [((3, 1), 0.75), ((None, None), 0.1), ((2, 6), 0.25)])
def test_every_stretch_of_a_mixture_has_the_domains_shares(weights: tuple[float | None, ...], share: float) -> None:
    windows = mixture(*weights).windows(10, 400, seed=0)
    tokens = windows.__getitems__(list(range(400)))
    assert tokens.shape == (400, 10)
    # No window crosses from one domain into the other.
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(10))
    is_first = tokens[:, 0] < 1000
    for stretch in is_first.split(40):
        assert stretch.sum().item() == pytest.approx(40 * share, abs=1)


def test_mixture_is_fixed_by_the_seed_and_a_longer_run_begins_alike() -> None:
    def tokens(samples: int, seed: int) -> torch.Tensor:
        return mixture(3, 1).windows(10, samples, seed).__getitems__(list(range(100)))

    assert torch.equal(tokens(100, 1), tokens(300, 1))
    assert not torch.equal(tokens(100, 1), tokens(100, 2))


def test_one_domain_is_trained_on_like_its_stream_alone() -> None:
    (domain, _) = mixture(None, None).domains
    whole = list(range(50))
    expected = TokenWindows(domain.stream, 10, 50, seed=4).__getitems__(whole)
    assert torch.equal(Text((domain,)).windows(10, 50, seed=4).__getitems__(whole), expected)


def test_held_out_text_of_a_mixture_is_that_of_its_domains() -> None:
    text = mixture(3, 1)
    assert torch.equal(text.held_out.blocks, torch.cat([torch.arange(20), torch.arange(1000, 1020)]).view(4, 10))
    assert text.train_tokens == 1000


def test_stream_does_not_depend_on_how_many_texts_are_tokenized_at_once(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"return value_{number}\n" for number in range(10)]
    whole = token_stream(tokenizer, texts)
    monkeypatch.setattr("sparse_backend.prosparse.tokens._TOKENIZED_AT_ONCE", 3)
    assert torch.equal(token_stream(tokenizer, texts), whole)


def test_held_out_blocks_are_consecutive_and_whole() -> None:
    blocks = HeldOutBlocks(torch.arange(35, dtype=torch.int32), 10)
    assert len(blocks) == 3
    assert torch.equal(torch.cat(list(blocks.batches(2))).flatten(), torch.arange(30))


def test_collation_takes_batches_and_single_windows_alike() -> None:
    windows = TokenWindows(torch.arange(100, dtype=torch.int32), 10, 4, 0)
    batch = as_model_input(windows.__getitems__([0, 1]))
    single = as_model_input([windows[0], windows[1]])
    assert torch.equal(batch["input_ids"], single["input_ids"])
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_text_shorter_than_the_context_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    corpus = read_corpus(str(write_corpus(tmp_path / "corpus.jsonl")))
    with pytest.raises(UserError, match="--context 100000"):
        read_text(corpus, tokenizer, 100_000)
