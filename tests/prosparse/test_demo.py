from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.prosparse import modeling
from sparse_backend.prosparse.corpus import held_out_documents
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.recipe import ThresholdRecipe
from sparse_backend.prosparse.recipe_file import read_recipe
from sparse_backend.prosparse.tokens import HeldOutBlocks, token_stream
from sparse_backend.prosparse.verify import held_out_texts

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def test_demo_is_sparse_small_and_intact() -> None:
    checkpoint = Checkpoint.open(DEMO)
    assert checkpoint.manifest is not None
    assert checkpoint.manifest.held_out.sparsity >= 0.85
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) < 16 * 2**20


def test_demo_was_made_by_the_demo_preset() -> None:
    manifest, recipe = Checkpoint.open(DEMO).manifest, read_recipe("demo")
    assert manifest is not None
    phases = {phase.name: phase for phase in manifest.phases}
    relu, l1, shift = (phases[name] for name in ("ReLU substitution", "L1 regularisation", "activation threshold"))
    assert relu.settings == recipe.run.model_dump()
    assert (relu.steps, relu.steps + l1.steps) == recipe.stage_ends
    schedule = [{"end": recipe.steps, "peak": recipe.stages[-1].peak}]
    assert l1.settings == recipe.l1.model_dump() | {"stages": schedule}
    assert {name: shift.settings[name] for name in ThresholdRecipe.model_fields} == recipe.threshold.model_dump(
        mode="json"
    )


def test_demo_holds_the_text_it_was_measured_on() -> None:
    checkpoint = Checkpoint.open(DEMO)
    assert checkpoint.manifest is not None
    (documents,) = held_out_texts(checkpoint).values()
    assert len(documents) == checkpoint.manifest.corpus.held_out_documents


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
