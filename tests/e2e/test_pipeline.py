"""A minute on the CPU from text to answers: train a tiny base, sparsify it, serve it with an API key, use and evaluate it."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from sparse_backend.checkpoint import Checkpoint
from tests.e2e.servers import PROSPARSE, Server
from tests.prosparse.corpora import write_corpus

KEY = "a-key"


def prosparse(*words: object) -> str:
    """Run a command that must succeed; returns what it prints."""
    done = subprocess.run([PROSPARSE, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    corpus = write_corpus(folder / "corpus.jsonl")
    prosparse("pretrain", folder / "base", "--preset", "tiny", "--corpus", corpus, "--tokens", 80_000, "--batch", 8)
    (folder / "recipe.yaml").write_text(
        """
        data: {keep_held_out: true, sources: [{path: corpus.jsonl, name: made up}]}
        training: {context: 128, batch: 8}
        stages: [{peak: 0, tokens: 10_000}, {peak: 1e-3, tokens: 40_000}]
        threshold: {sweep: [0, 0.1, 0.2], budget: 0.05}
        """
    )
    prosparse("sparsify", folder / "base", folder / "sparse", "--recipe", folder / "recipe.yaml")
    return folder / "sparse"


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    server = Server(checkpoint, checkpoint.parent / "server.log", "--api-key", KEY, "--", "--enforce-eager")
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def test_completion(server: Server, checkpoint: Path) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        model = client.models.list().data[0].id
        completion = client.completions.create(model=model, prompt="def compute_", max_tokens=8, temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    # The base learnt its corpus: words of made-up functions, nothing that random weights would put together.
    words = re.findall("[a-z]+", (checkpoint.parent / "corpus.jsonl").read_text())
    assert set(re.findall("[a-z]+", completion.choices[0].text)) & set(words)


def test_evaluation(server: Server, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'prosparse-serve[eval]'")
    command = ("eval", checkpoint, "--url", server.url, "--out", tmp_path / "eval.json")
    refused = subprocess.run([PROSPARSE, *map(str, command)], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "OPENAI_API_KEY" in refused.stderr

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    table = prosparse(*command)
    result = json.loads((tmp_path / "eval.json").read_text())["results"]["made up"]
    assert "made up" in table
    assert f"{result['perplexity']:.4f}" in table
    manifest = Checkpoint.open(checkpoint).manifest
    assert manifest is not None
    assert result["samples"] == manifest.corpus.held_out_documents
