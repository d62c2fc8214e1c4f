"""``prosparse sparsify``: ProSparse (arXiv 2402.13516) on a dense model, its three steps in order.

1. ReLU replaces the activation, and training goes on with λ = 0.
2. Training goes on with λ·L1 of act(gate)*up added to the loss, λ following a schedule.
3. The activation threshold is raised as far as a loss budget allows, without training.

What the manifest says of loss and sparsity is measured on held-out documents with the folder's own bfloat16 weights.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from time import perf_counter

import torch

from sparse_backend.checkpoint import CorpusRecord, HeldOutRecord, LayerRecord, Manifest, PhaseRecord, hash_files
from sparse_backend.errors import UserError
from sparse_backend.prosparse import modeling, threshold
from sparse_backend.prosparse.checkpoints import (
    check_base,
    copy_tokenizer,
    device_name,
    load_model,
    load_tokenizer,
    pretraining,
    save_activation,
    save_weights,
    versions,
)
from sparse_backend.prosparse.command import add_shared_arguments, building, command_line, main, runtime_from
from sparse_backend.prosparse.corpus import Corpus, read_corpus
from sparse_backend.prosparse.evaluate import Measurement, measure
from sparse_backend.prosparse.recipe import SparsifyRecipe, TrainingRecipe, add_flags, with_flags
from sparse_backend.prosparse.regulariser import L1_REDUCTION
from sparse_backend.prosparse.schedule import L1Schedule
from sparse_backend.prosparse.threshold import SweepPoint
from sparse_backend.prosparse.tokens import Text, read_text
from sparse_backend.prosparse.trainer import OPTIMIZER, Runtime, train

NAME = "sparsify"
DESCRIPTION = "Make a dense model sparse: ReLU, L1 regularisation, activation threshold (ProSparse)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of a LLaMA-family model with Swish or GELU")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    add_shared_arguments(parser)
    add_flags(parser, SparsifyRecipe)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked beforehand, then run the job."""
    recipe = with_flags(SparsifyRecipe(), args)
    runtime = runtime_from(args)
    check_base(args.base)
    with building(args.out) as folder:
        corpus = read_corpus(args.corpus, args.corpus_name)
        manifest = sparsify(args.base, folder, corpus, recipe, runtime)
    held_out = manifest.held_out
    print(
        f"wrote {args.out}: {manifest.activation}, held-out loss {held_out.loss:.4f} (base {held_out.base_loss:.4f}),"
        f" sparsity {held_out.sparsity:.2%}",
        flush=True,
    )
    return 0


def sparsify(base: Path, folder: Path, corpus: Corpus, recipe: SparsifyRecipe, runtime: Runtime) -> Manifest:
    """Run the three steps on ``base`` and write the checkpoint into ``folder``, an existing empty folder.

    Raises:
        UserError: base, corpus and recipe do not fit together, training diverges, or files cannot be written.
    """
    modeling.register()
    base_activation = check_base(base)
    # Whatever the manifest says of the input is read before hours of training, not after.
    pretrained, corpus_sha256 = pretraining(base), corpus.sha256
    text, base_loss = _measure_base(base, corpus, recipe, runtime)
    print(f"base: {base_activation}, held-out loss {base_loss:.4f}", flush=True)

    # Steps 1 and 2, one run of the optimiser.
    model = load_model(base, torch.float32, hidden_act="relu")
    schedule = recipe.l1_schedule
    replaced = "BASE computes ReLU already" if base_activation == "relu" else f"ReLU replaces {base_activation}"
    print(f"step 1: {replaced}; λ = 0 for {schedule.relu_steps} steps of {recipe.steps}", flush=True)
    seconds = train(model, text, recipe, runtime, folder / "trainer", schedule)
    rmtree(folder / "trainer")
    save_weights(model, folder)
    copy_tokenizer(base, folder)
    del model

    # Step 3, on the weights as saved.
    started = perf_counter()
    points = threshold.sweep(load_model(folder, torch.bfloat16).to(runtime.device), text.held_out)
    chosen = threshold.choose(points, recipe.threshold_budget)
    activation = threshold.activation_of(chosen.threshold)
    architecture = save_activation(folder, activation)
    _print_sweep(points, chosen)
    sweep = PhaseRecord(
        name="activation threshold",
        steps=0,
        tokens=0,
        seconds=round(perf_counter() - started, 1),
        settings={"threshold_budget": recipe.threshold_budget, "sweep": [point.rounded() for point in points]},
    )

    measured = measure(load_model(folder, torch.bfloat16).to(runtime.device), text.held_out)
    manifest = Manifest(
        command=command_line(NAME),
        architecture=architecture,
        activation=activation,
        base_activation=base_activation,
        corpus=CorpusRecord(
            name=corpus.name,
            sha256=corpus_sha256,
            documents=len(corpus.documents),
            held_out_documents=len(corpus.held_out),
            train_tokens=len(text.stream),
            held_out_tokens=text.held_out.blocks.numel(),
        ),
        phases=[*pretrained, *_training_phases(recipe, schedule, seconds), sweep],
        seed=recipe.seed,
        versions=versions(),
        device=device_name(runtime.device),
        held_out=HeldOutRecord(
            tokens=text.held_out.blocks.numel(),
            loss=round(measured.loss, 4),
            base_loss=round(base_loss, 4),
            sparsity=round(measured.mean_sparsity, 4),
        ),
        layers=_layer_records(measured),
        files=hash_files(folder),
    )
    manifest.write(folder)
    return manifest


def _measure_base(base: Path, corpus: Corpus, recipe: SparsifyRecipe, runtime: Runtime) -> tuple[Text, float]:
    """The corpus in the base's tokens, and the base's held-out loss."""
    model = load_model(base, torch.bfloat16).to(runtime.device)
    longest = model.config.max_position_embeddings
    if recipe.context > longest:
        raise UserError(
            f"--context is {recipe.context}, BASE was made for {longest} tokens at most (max_position_embeddings)."
            " Take a shorter context."
        )
    text = read_text(corpus, load_tokenizer(base, model.config.vocab_size), recipe.context)
    return text, measure(model, text.held_out).loss


def _print_sweep(points: list[SweepPoint], chosen: SweepPoint) -> None:
    for point in points:
        mark = "  <- chosen" if point is chosen else ""
        figures = f"held-out loss {point.loss:.4f}  sparsity {point.sparsity:.2%}"
        print(f"step 3: threshold {point.threshold:<7g}  {figures}{mark}", flush=True)


def _training_phases(recipe: SparsifyRecipe, schedule: L1Schedule, seconds: list[float]) -> list[PhaseRecord]:
    """Steps 1 and 2; the settings of the optimiser run, which both share, are with step 1."""
    end = schedule.relu_steps
    relu_seconds = seconds[end - 1] if end else 0.0
    run = recipe.model_dump(include=set(TrainingRecipe.model_fields)) | {"optimizer": OPTIMIZER}
    l1 = recipe.model_dump(include={"schedule", "l1"}) | {
        "l1_reduction": L1_REDUCTION,
        "l1_stages": [asdict(stage) for stage in schedule.stages],
    }
    phases = [
        ("ReLU substitution", end, relu_seconds, run | {"relu_share": recipe.relu_share}),
        ("L1 regularisation", recipe.steps - end, seconds[-1] - relu_seconds, l1),
    ]
    return [
        PhaseRecord(
            name=name, steps=steps, tokens=steps * recipe.step_tokens, seconds=round(taken, 1), settings=settings
        )
        for name, steps, taken, settings in phases
    ]


def _layer_records(measured: Measurement) -> list[LayerRecord]:
    return [
        LayerRecord(
            layer=layer, sparsity=round(sparsity, 4), neuron_frequency=[round(share, 4) for share in frequency.tolist()]
        )
        for layer, (sparsity, frequency) in enumerate(
            zip(measured.sparsity.tolist(), measured.neuron_frequency, strict=True)
        )
    ]


if __name__ == "__main__":
    raise SystemExit(main(NAME, DESCRIPTION, add_arguments, run))
