from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.prosparse import modeling
from sparse_backend.prosparse.corpus import held_out_documents
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.tokens import HeldOutBlocks, token_stream

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def test_demo_is_sparse_small_and_intact() -> None:
    checkpoint = Checkpoint.open(DEMO)
    assert checkpoint.manifest is not None
    assert checkpoint.manifest.held_out.sparsity >= 0.85
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 16 * 2**20


def test_demo_does_on_this_pythons_sources_what_its_manifest_says() -> None:
    manifest = Checkpoint.open(DEMO).manifest
    assert manifest is not None
    modeling.register()
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    stream = token_stream(AutoTokenizer.from_pretrained(DEMO), held_out_documents("stdlib"))
    measured = measure(model, HeldOutBlocks(stream[: 8 * 512], 512))
    # Eight short blocks, perhaps of another Python version, stand for 145,408 tokens: hence the width.
    assert abs(measured.mean_sparsity - manifest.held_out.sparsity) < 0.03
    # A model that knows nothing has ln 4096 = 8.3.
    assert measured.loss < 3
