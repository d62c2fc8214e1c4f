"""``prosparse sparsify``: ProSparse (arXiv 2402.13516) on a dense model, its three steps in order.

1. ReLU replaces the activation, and training goes on with λ = 0.
2. Training goes on with λ·L1 of act(gate)*up added to the loss, λ following a schedule; then, where the recipe has it,
   instruction tuning with a smaller λ.
3. The activation threshold is raised as far as a loss budget allows, without training.

Each is a phase that an interrupted run is gone on from. What the manifest says of loss and sparsity is measured on held-out
documents with the folder's own bfloat16 weights.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copytree, rmtree
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_backend.checkpoint import (
    CorpusRecord,
    DomainRecord,
    HeldOutRecord,
    LayerRecord,
    Manifest,
    PhaseRecord,
    hash_files,
    sha256_of,
)
from sparse_backend.errors import UserError
from sparse_backend.prosparse import modeling, threshold
from sparse_backend.prosparse.checkpoints import (
    check_base,
    check_base_loss,
    copy_tokenizer,
    device_name,
    load_model,
    load_tokenizer,
    pretraining,
    save_activation,
    save_weights,
    versions,
)
from sparse_backend.prosparse.command import add_shared_arguments, command_line, main, runtime_from
from sparse_backend.prosparse.corpus import Corpus, read_mixture
from sparse_backend.prosparse.evaluate import Measurement, combined, measure
from sparse_backend.prosparse.plan import plan
from sparse_backend.prosparse.recipe import Recipe
from sparse_backend.prosparse.recipe_flags import add_recipe_arguments, recipe_from
from sparse_backend.prosparse.report import FOLDER_NAME, write_report
from sparse_backend.prosparse.schedule import L1Schedule, Stage
from sparse_backend.prosparse.target import SparsityTarget
from sparse_backend.prosparse.threshold import SweepPoint
from sparse_backend.prosparse.tokens import Text, read_text
from sparse_backend.prosparse.trainer import L1Weight, Runtime, TrainingRun, train
from sparse_backend.prosparse.verify import HELD_OUT_NAME, write_held_out
from sparse_backend.prosparse.workspace import BASE_PHASE, Workspace, check_absent, opened

NAME = "sparsify"
DESCRIPTION = "Make a dense model sparse: ReLU, L1 regularisation, activation threshold (ProSparse)."

# λ to start from where a target is given and the recipe's stages have none: far below what any model needs.
_FIRST_WEIGHT = 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "base", type=Path, nargs="?", metavar="BASE", help="folder of a dense model with gated feed-forward layers"
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder to create")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print stages, tokens, memory per device and a time estimate, and do nothing; BASE and OUT may be left out",
    )
    add_shared_arguments(parser, corpus_required=False)
    parser.add_argument(
        "--stop-after",
        choices=("relu", "training"),
        help="stop after step 1, or before the threshold sweep; the same command without this flag goes on from there",
    )
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked beforehand, then run the job, or go on with an interrupted one."""
    recipe = recipe_from(args)
    if args.dry_run:
        print(plan(recipe, args.base))
        return 0
    if args.base is None or args.out is None:
        raise UserError("BASE and OUT are needed: the dense model's folder, and the folder to create.")
    runtime = runtime_from(args)
    check_base(args.base)
    check_absent(args.out)
    if args.stop_after == "relu" and weight_schedule(recipe).relu_steps == 0:
        raise UserError(
            "--stop-after relu: the recipe has no stage with λ = 0 to stop after. Add one, or leave the flag out."
        )
    with ExitStack() as stack:
        if not runtime.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        corpus = read_mixture(recipe.require_data())
        settings = settings_of(args.base, corpus, recipe)
        workspace = stack.enter_context(opened(args.out, settings, is_writer=runtime.is_first))
        manifest = sparsify(args.base, workspace, corpus, recipe, runtime, args.stop_after)
        if manifest is None:
            return 0
        workspace.finish()
    held_out = manifest.held_out
    print(
        f"wrote {args.out}: {manifest.activation}, held-out loss {held_out.loss:.4f} (base {held_out.base_loss:.4f}),"
        f" sparsity {held_out.sparsity:.2%}",
        flush=True,
    )
    return 0


def settings_of(base: Path, corpus: Corpus, recipe: Recipe) -> dict[str, Any]:
    """What an interrupted run must have in common with the one that goes on with it.

    The threshold is left out: it is chosen after training, and chosen again where its settings differ.
    """
    return {
        "base": hash_files(base),
        "corpus": corpus.sha256,
        # The hash is over the documents: not over their split, nor over their mixture.
        "held_out": {domain.name: domain.held_out_share for domain in corpus.domains},
        "weights": {domain.name: domain.weight for domain in corpus.domains},
        "recipe": recipe.model_dump(mode="json", exclude={"description", "model", "hardware", "threshold", "data"}),
    }


@dataclass(frozen=True)
class BaseFigures:
    """What is known of the base before training."""

    activation: str
    loss: float
    losses: Mapping[str, float]
    """By domain."""
    gate_scale: float
    """Root mean square of the gate's values."""


def sparsify(
    base: Path, workspace: Workspace, corpus: Corpus, recipe: Recipe, runtime: Runtime, stop_after: str | None = None
) -> Manifest | None:
    """Run the three steps on ``base`` and write the checkpoint into the workspace; phases that are done are not repeated.

    Returns:
        The checkpoint's manifest; None in processes other than the first, and where ``stop_after`` ended the run before.

    Raises:
        UserError: base, corpus and recipe do not fit together, training diverges, or files cannot be written.
    """
    modeling.register()
    # Whatever the manifest says of the input is read before hours of training, not after.
    pretrained, corpus_sha256 = pretraining(base), corpus.sha256
    text, found = read_base(base, workspace, corpus, recipe, runtime)
    sft_text = None if recipe.sft is None else _sft_text(base, recipe)

    schedule = weight_schedule(recipe)
    run = train_steps_1_and_2(base, workspace, text, recipe, runtime, schedule, found.activation, stop_after == "relu")
    if stop_after == "relu":
        print("stopped after step 1, as --stop-after asks", flush=True)
        return None
    runs = {"training": run}
    if sft_text is not None:
        runs["sft"] = _tune(workspace, run, sft_text, recipe, runtime)
    if stop_after == "training" or not runtime.is_first:
        if stop_after == "training":
            print("stopped before step 3, as --stop-after asks", flush=True)
        return None
    trained = list(runs.values())[-1].folder

    sweep = _sweep(workspace, trained, text, recipe, runtime)
    folder, architecture = _export(base, workspace, trained, sweep.chosen)
    if recipe.data is not None and recipe.data.keep_held_out:
        write_held_out(folder, corpus)

    model = load_model(folder, torch.bfloat16).to(runtime.device)
    measured = measure_domains(model, text)
    whole = combined(list(measured.values()))
    weights = {domain.name: domain.weight for domain in corpus.domains}
    manifest = Manifest(
        command=command_line(NAME),
        architecture=architecture,
        activation=threshold.activation_of(sweep.chosen.threshold),
        base_activation=found.activation,
        corpus=CorpusRecord(
            name=corpus.name,
            sha256=corpus_sha256,
            documents=len(corpus.documents),
            held_out_documents=len(corpus.held_out),
            held_out_share=corpus.domains[0].held_out_share,
            train_tokens=text.train_tokens,
            held_out_tokens=whole.tokens,
        ),
        phases=[*pretrained, *_training_phases(recipe, schedule, runs), sweep.phase],
        seed=recipe.training.seed,
        versions=versions(),
        device=device_name(runtime.device),
        held_out=HeldOutRecord(
            tokens=whole.tokens,
            loss=round(whole.loss, 4),
            base_loss=round(found.loss, 4),
            sparsity=round(whole.mean_sparsity, 4),
            context=recipe.training.context,
            text_sha256=sha256_of(folder / HELD_OUT_NAME) if (folder / HELD_OUT_NAME).is_file() else None,
        ),
        domains=[
            DomainRecord(
                name=name,
                weight=weights[name],
                tokens=part.tokens,
                loss=round(part.loss, 4),
                base_loss=round(found.losses[name], 4),
                sparsity=round(part.mean_sparsity, 4),
            )
            for name, part in measured.items()
        ],
        layers=_layer_records(whole),
        files=hash_files(folder),
    )
    manifest.write(folder)
    write_report(folder, manifest, {name: run.history for name, run in runs.items()}, sweep.phase.settings["points"])
    if (workspace.folder / "tensorboard").is_dir():
        copytree(workspace.folder / "tensorboard", folder / FOLDER_NAME / "tensorboard")
    if recipe.target_sparsity is not None:
        print(
            f"target: {recipe.target_sparsity:.2%} before the threshold; reached {sweep.points[0].sparsity:.2%} on held-out"
            f" text, {whole.mean_sparsity:.2%} with it",
            flush=True,
        )
    return manifest


def read_base(
    base: Path, workspace: Workspace, corpus: Corpus, recipe: Recipe, runtime: Runtime
) -> tuple[Text, BaseFigures]:
    """The corpus in the base's tokens, and what the base does on its held-out part.

    Raises:
        UserError: the context is longer than the base's, the base cannot be loaded, or there is too little text.
    """
    config = json.loads((base / "config.json").read_text())
    longest, context = config["max_position_embeddings"], recipe.training.context
    for setting, tokens in (("--context", context), ("sft.context", 0 if recipe.sft is None else recipe.sft.context)):
        if tokens > longest:
            raise UserError(
                f"{setting} is {tokens}, BASE was made for {longest} tokens at most (max_position_embeddings)."
                " Take a shorter context."
            )
    text = read_text(corpus, load_tokenizer(base, config["vocab_size"]), context)
    result = workspace.result(BASE_PHASE)
    if result is None:
        measured = measure_domains(load_model(base, torch.bfloat16).to(runtime.device), text)
        whole = combined(list(measured.values()))
        check_base_loss(base, whole.loss, config["vocab_size"])
        result = {
            "activation": check_base(base),
            "loss": whole.loss,
            "losses": {name: part.loss for name, part in measured.items()},
            "gate_scale": whole.gate_scale,
        }
        workspace.record(BASE_PHASE, result)
    found = BaseFigures(**result)
    print(f"base: {found.activation}, held-out loss {found.loss:.4f}", flush=True)
    return text, found


def measure_domains(model: PreTrainedModel, text: Text) -> dict[str, Measurement]:
    """What a model does on each domain's held-out blocks."""
    return {domain.name: measure(model, domain.held_out) for domain in text.domains}


def weight_schedule(recipe: Recipe) -> L1Weight:
    """λ by step: the recipe's stages, or a controller that steers towards its target."""
    stages = recipe.l1_schedule
    if recipe.target_sparsity is None:
        return stages
    first = next((stage.peak for stage in stages.stages if stage.peak > 0), _FIRST_WEIGHT / recipe.l1.scale)
    return SparsityTarget(recipe.target_sparsity, recipe.steps, stages.relu_steps, first)


def train_steps_1_and_2(
    base: Path,
    workspace: Workspace,
    text: Text,
    recipe: Recipe,
    runtime: Runtime,
    schedule: L1Weight,
    base_activation: str,
    stop_after_relu: bool = False,
) -> TrainingRun:
    """Steps 1 and 2, one run of the optimiser, or what is left of it."""
    replaced = "BASE computes ReLU already" if base_activation == "relu" else f"ReLU replaces {base_activation}"
    print(f"step 1: {replaced}; λ = 0 for {schedule.relu_steps} steps of {recipe.steps}", flush=True)
    return train(
        load_model(base, torch.float32, hidden_act="relu"),
        text,
        recipe.run,
        runtime,
        workspace.trainer,
        schedule=schedule,
        l1=recipe.l1,
        decay_steps=recipe.last_stage_steps,
        logs=workspace.folder / "tensorboard" / "training",
        stop_after=schedule.relu_steps if stop_after_relu else None,
    )


def _sft_text(base: Path, recipe: Recipe) -> Text:
    sft = recipe.sft
    if sft is None or sft.data is None:
        raise UserError("The recipe's sft has no data of its own: give sft.data.sources, instruction data only.")
    vocab_size = json.loads((base / "config.json").read_text())["vocab_size"]
    return read_text(read_mixture(sft.data), load_tokenizer(base, vocab_size), sft.context)


def _tune(workspace: Workspace, before: TrainingRun, text: Text, recipe: Recipe, runtime: Runtime) -> TrainingRun:
    """The SFT phase: a run of its own, from the weights that ``before`` left."""
    settings, sft = recipe.sft_run, recipe.sft
    if settings is None or sft is None:
        raise ValueError("the recipe has no sft")
    print(f"instruction tuning: {settings.steps} steps at λ = {sft.peak:g}", flush=True)
    return train(
        load_model(before.folder, torch.float32),
        text,
        settings,
        runtime,
        workspace.below("sft").trainer,
        schedule=L1Schedule(0, [Stage(settings.steps, sft.peak)]),
        l1=recipe.l1,
        logs=workspace.folder / "tensorboard" / "sft",
    )


@dataclass(frozen=True)
class _Sweep:
    points: Sequence[SweepPoint]
    chosen: SweepPoint
    phase: PhaseRecord


def _sweep(workspace: Workspace, trained: Path, text: Text, recipe: Recipe, runtime: Runtime) -> _Sweep:
    """Step 3 on the trained weights in bfloat16, or what an earlier process found with the same settings."""
    settings = recipe.threshold.model_dump(mode="json")
    result = workspace.result("threshold")
    if result is None or result["settings"] != settings:
        started = perf_counter()
        found = threshold.sweep(load_model(trained, torch.bfloat16).to(runtime.device), text.held_out, recipe.threshold)
        result = {
            "settings": settings,
            "points": [asdict(point) for point in found],
            "seconds": round(perf_counter() - started, 1),
        }
        workspace.record("threshold", result)
    points = [SweepPoint(**{**point, "factors": tuple(point["factors"])}) for point in result["points"]]
    chosen = threshold.choose(points, recipe.threshold.budget, recipe.target_sparsity)
    for point in points:
        mark = "  <- chosen" if point is chosen else ""
        figures = f"held-out loss {point.loss:.4f}  sparsity {point.sparsity:.2%}"
        variant = " per layer" if point.factors else ""
        print(f"step 3: threshold {point.threshold:<7g}{variant}  {figures}{mark}", flush=True)
    recorded = [point.rounded() | ({"chosen": True} if point is chosen else {}) for point in points]
    phase = PhaseRecord(
        name="activation threshold",
        steps=0,
        tokens=0,
        seconds=result["seconds"],
        settings=settings | {"points": recorded},
    )
    return _Sweep(points, chosen, phase)


def _export(base: Path, workspace: Workspace, trained: Path, chosen: SweepPoint) -> tuple[Path, str]:
    """The checkpoint's folder with weights in bfloat16, config and tokenizer, and its architecture."""
    # What a killed process left of it is written again.
    rmtree(workspace.checkpoint)
    folder = workspace.checkpoint
    model = load_model(trained, torch.bfloat16)
    if chosen.factors:
        threshold.fold(model, chosen.factors)
    save_weights(model, folder)
    architecture = save_activation(folder, threshold.activation_of(chosen.threshold))
    copy_tokenizer(base, folder)
    return folder, architecture


def _training_phases(recipe: Recipe, schedule: L1Weight, runs: Mapping[str, TrainingRun]) -> list[PhaseRecord]:
    """Steps 1 and 2, and SFT; the settings of the optimiser run, which the first two share, are with step 1."""
    end, run = schedule.relu_steps, runs["training"]
    relu_seconds = run.seconds_at(end)
    l1: dict[str, Any] = {"reduction": recipe.l1.reduction, "scale": recipe.l1.scale}
    if recipe.target_sparsity is not None:
        last = [entry["lambda"] for entry in run.history if "lambda" in entry][-1]
        l1 |= {"target_sparsity": recipe.target_sparsity, "last_lambda": last}
    else:
        l1 |= {"stages": [asdict(stage) for stage in recipe.l1_schedule.stages]}
    step_tokens = recipe.training.step_tokens
    phases = [
        ("ReLU substitution", end, end * step_tokens, relu_seconds, recipe.run.model_dump()),
        (
            "L1 regularisation",
            recipe.steps - end,
            (recipe.steps - end) * step_tokens,
            run.seconds_at(recipe.steps) - relu_seconds,
            l1,
        ),
    ]
    if recipe.sft_run is not None and recipe.sft is not None:
        sft = recipe.sft_run
        settings = sft.model_dump() | l1 | {"stages": [{"end": sft.steps, "peak": recipe.sft.peak}]}
        phases.append(
            ("instruction tuning", sft.steps, sft.steps * sft.step_tokens, runs["sft"].seconds_at(sft.steps), settings)
        )
    return [
        PhaseRecord(name=name, steps=steps, tokens=tokens, seconds=round(seconds, 1), settings=settings)
        for name, steps, tokens, seconds, settings in phases
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
