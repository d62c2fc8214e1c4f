"""The job from end to end on families other than LLaMA, with random bases."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_backend.prosparse import job, modeling
from sparse_backend.prosparse.checkpoints import save_weights
from sparse_backend.prosparse.command import main
from sparse_backend.prosparse.corpus import read_corpus
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.modeling import SPARSE_MODELS
from sparse_backend.prosparse.tokens import read_text, train_tokenizer
from tests.prosparse.corpora import write_corpus
from tests.prosparse.models import random_model

RECIPE = """
extends: demo
data: {sources: [{path: corpus.jsonl}]}
training: {context: 64, batch: 8}
stages: [{peak: 0, steps: 5}, {peak: 1e-3, steps: 25}]
"""


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "minicpm"])
def test_recipe_makes_a_sparse_model_of_the_family_that_does_what_its_manifest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    corpus = read_corpus(str(write_corpus(tmp_path / "corpus.jsonl")))
    tokenizer = train_tokenizer(corpus.training, vocab_size=400, context=64)
    # One more than it has: transformers gives every qwen2 folder's tokenizer Qwen's own end of text.
    model = random_model(family, hidden_act="silu", vocab_size=len(tokenizer) + 1, initializer_range=0.05)
    save_weights(model, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "sparse"
    monkeypatch.setattr(
        "sys.argv", ["job.py", str(tmp_path / "base"), str(out), "--recipe", str(tmp_path / "recipe.yaml")]
    )
    assert main(job.NAME, job.DESCRIPTION, job.add_arguments, job.run) == 0

    manifest = json.loads((out / "prosparse.json").read_text())
    modeling.register()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert type(loaded) is SPARSE_MODELS[family]
    assert manifest["architecture"] == type(loaded).__name__
    texts = corpus.held_out
    base_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(out)(texts)["input_ids"] == base_tokenizer(texts)["input_ids"]
    measured = measure(loaded, read_text(corpus, AutoTokenizer.from_pretrained(out), 64).held_out)
    assert manifest["held_out"]["loss"] == pytest.approx(measured.loss, abs=1e-4)
    assert manifest["held_out"]["sparsity"] == pytest.approx(measured.mean_sparsity, abs=1e-4)
    assert manifest["held_out"]["loss"] < manifest["held_out"]["base_loss"] - 0.3
    # ReLU alone leaves about half of a random gate.
    assert measured.mean_sparsity > 0.55
