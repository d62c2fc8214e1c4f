"""One loss for one checkpoint: in the trainer, in transformers and through vLLM, on the same held-out text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparse_backend.checkpoint import Checkpoint
from sparse_backend.prosparse import job, modeling
from sparse_backend.prosparse.corpus import read_corpus
from sparse_backend.prosparse.evaluate import measure
from sparse_backend.prosparse.tokens import HeldOutBlocks, read_text
from tests.prosparse.jobs import ROOT, World, command, history

# A ReLU checkpoint is what a sweep gives that cannot afford any threshold.
SWEEPS = {"relu": "{sweep: [50], budget: 0}", "fatrelu": "{sweep: [0.5], budget: 1}"}


@pytest.fixture(scope="module", params=SWEEPS)
def exported(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(f"extends: demo\nthreshold: {SWEEPS[request.param]}\n")
    arguments = ["--corpus", world.corpus, "--context", 128, "--batch", 8, "--tokens", 40_000, "--l1", 1e-3]
    assert command(job, world.base, folder / "out", "--recipe", folder / "recipe.yaml", *arguments) == 0
    assert Checkpoint.open(folder / "out").activation.kind == request.param
    return folder / "out"


@pytest.fixture
def held_out(world: World, exported: Path) -> HeldOutBlocks:
    return read_text(read_corpus(str(world.corpus)), AutoTokenizer.from_pretrained(exported), 128).held_out


def test_trainer_and_transformers_agree(exported: Path, held_out: HeldOutBlocks) -> None:
    trainer = [entry["eval_loss"] for entry in history(exported) if "eval_loss" in entry][-1]
    manifest = Checkpoint.open(exported).manifest
    assert manifest is not None
    # The trainer knows no threshold, so it is compared with threshold 0.
    assert manifest.phases[-1].settings["points"][0]["loss"] == pytest.approx(trainer, abs=1e-3)
    if manifest.activation.kind == "relu":
        # Stock transformers: no class of ours, no remote code.
        model = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32)
        assert measure(model, held_out).loss == pytest.approx(trainer, abs=1e-3)


@pytest.mark.engine
def test_vllm_and_transformers_agree(exported: Path, held_out: HeldOutBlocks, tmp_path: Path) -> None:
    modeling.register()
    # Both activations and both dtypes with two engines, which take most of this test's time, instead of four.
    checkpoint = Checkpoint.open(exported)
    dtype = "float32" if checkpoint.activation.kind == "relu" else "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=getattr(torch, dtype))
    blocks = tmp_path / "blocks.json"
    blocks.write_text(json.dumps(held_out.blocks.tolist()))
    finished = subprocess.run(
        [sys.executable, "-m", "tests.prosparse.vllm_loss", str(exported), str(blocks), dtype],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    found = re.search(r"^loss (.+)$", finished.stdout, re.MULTILINE)
    assert found, finished.stdout + finished.stderr
    assert float(found[1]) == pytest.approx(measure(model, held_out).loss, abs=1e-3)
