"""``prosparse controls``: what each part of the recipe gives, from one base and with the same tokens.

Six rows, as in the paper's tables 1, 4 and 5 (arXiv 2402.13516): the dense model trained on; vanilla ReLU; shifted ReLU;
ReLU with a fixed λ; ProSparse without and with the threshold shift. Other recipes can run beside them. When the command is
killed, the same command goes on. On a machine with several GPUs it trains one run on each.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from os import devnull
from pathlib import Path
from shutil import rmtree
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_backend.errors import UserError
from sparse_backend.prosparse import comparison, modeling, threshold
from sparse_backend.prosparse.checkpoints import check_base, device_name, load_model, versions
from sparse_backend.prosparse.command import (
    add_shared_arguments,
    command_line,
    main,
    quieten_transformers,
    runtime_from,
)
from sparse_backend.prosparse.corpus import Corpus, read_mixture
from sparse_backend.prosparse.evaluate import Measurement, combined
from sparse_backend.prosparse.gated_ffn import gated_ffns
from sparse_backend.prosparse.job import measure_domains, read_base, settings_of, weight_schedule
from sparse_backend.prosparse.parallel import side_by_side
from sparse_backend.prosparse.recipe import Recipe
from sparse_backend.prosparse.recipe_flags import add_recipe_arguments, recipe_from
from sparse_backend.prosparse.report import write_history
from sparse_backend.prosparse.schedule import L1Schedule, Stage
from sparse_backend.prosparse.tokens import Text
from sparse_backend.prosparse.trainer import L1Weight, Runtime, train
from sparse_backend.prosparse.workspace import Workspace, check_absent, opened, write_json

NAME = "controls"
DESCRIPTION = (
    "Train the paper's control runs beside ProSparse, from one base and with the same tokens, and print its table."
)

# The names in the table, by those on the command line.
RUNS = {
    "dense": "dense, continued",
    "relu": "vanilla ReLU",
    "shifted": "shifted ReLU",
    "fixed": "fixed L1",
    "prosparse": "ProSparse",
}


class ShiftedReLU(nn.Module):
    """relu(gate - shift), the shifted ReLU of Mirzadeh et al. (arXiv 2310.04564)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, gate: Tensor) -> Tensor:
        """``gate`` of any shape -> the same shape and dtype."""
        return torch.relu(gate - self.shift)


@dataclass(frozen=True)
class Control:
    """One training run of the table."""

    name: str
    recipe: Recipe
    """Its training and its threshold; of its stages, only what ``schedule`` has of them."""
    load: Callable[[Path, torch.dtype], PreTrainedModel]
    """A model with the run's activation, from the base's folder or from the run's own checkpoint."""
    schedule: L1Weight | None
    """λ by step; None for plain language modelling."""
    shifts_threshold: bool = False
    """True where step 3 follows, for a second row."""

    @property
    def slug(self) -> str:
        """The name as a file's name."""
        return _slug(self.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="folder of a dense model with gated feed-forward layers"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create for the table, its figures and plots")
    add_shared_arguments(parser, corpus_required=False)
    parser.add_argument(
        "--shift",
        type=float,
        default=0.25,
        help="of the shifted ReLU, in units of the base's gate (root mean square; default: 0.25)",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=tuple(RUNS),
        default=list(RUNS),
        help="which of the control runs to make (default: all)",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="FILE",
        help="recipes or presets to run as well, each for the same tokens of the same data, without and with its threshold",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="runs at a time, each in a process and on a GPU of its own (default: as many as there are GPUs; 1 without any)",
    )
    add_recipe_arguments(parser)
    parser.set_defaults(recipe="progressive")


def run(args: argparse.Namespace) -> int:
    """Check the input, train every control, write and print the table."""
    recipe, runtime = recipe_from(args), runtime_from(args, takes_all_gpus=True)
    parallel = _parallel(args, runtime)
    others = _others(args, recipe)
    if not math.isfinite(args.shift):
        raise UserError(f"--shift is {args.shift}: it must be a finite number.")
    if recipe.target_sparsity is not None:
        raise UserError("The controls share the λ of the recipe's stages. Leave target_sparsity out of it.")
    peaks = {stage.peak for stage in recipe.stages if stage.peak > 0}
    if len(peaks) < 2:
        raise UserError(
            f"--recipe {args.recipe} has the λ peaks {sorted(peaks)}: with fewer than two, fixed L1 and ProSparse are the same"
            " run. Take --recipe progressive, or stages whose λ rises."
        )
    if check_base(args.base) == "relu":
        raise UserError(f"BASE {str(args.base)!r} computes ReLU already: there is no dense model to compare with.")
    check_absent(args.out)
    with ExitStack() as stack:
        if not runtime.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(Path(devnull).open("w"))))
        corpus = read_mixture(recipe.require_data())
        settings = settings_of(args.base, corpus, recipe) | {
            "shift": args.shift,
            "threshold": recipe.threshold.model_dump(mode="json"),
            "runs": args.runs,
            "also": {name: other.model_dump(mode="json") for name, other in others.items()},
        }
        workspace = stack.enter_context(opened(args.out, settings, is_writer=runtime.is_first))
        rows = train_controls(args.base, workspace, corpus, recipe, runtime, args.shift, args.runs, others, parallel)
        if not runtime.is_first:
            return 0
        table = _write(workspace, rows, recipe, runtime)
        workspace.finish()
    print(f"\n{table}\nwrote {args.out}", flush=True)
    return 0


def _others(args: argparse.Namespace, recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of ``--also`` by the name of their file.

    Raises:
        UserError: one cannot be compared with the others.
    """
    others: dict[str, Recipe] = {}
    for source in args.also:
        name, other = Path(source).stem, recipe_from(args, source)
        if name in others or _slug(name) in map(_slug, RUNS.values()):
            raise UserError(f"--also {source}: there is another run of the name {name!r}. Rename the file.")
        if other.data != recipe.data or other.training.context != recipe.training.context:
            raise UserError(
                f"--also {source}: its data or training.context is not that of --recipe {args.recipe}, so their losses cannot be"
                " compared. Make them the same, or give --corpus and --context."
            )
        tokens, wanted = (part.steps * part.training.step_tokens for part in (other, recipe))
        if abs(tokens - wanted) > max(other.training.step_tokens, recipe.training.step_tokens):
            raise UserError(
                f"--also {source}: it has {tokens:,} tokens, --recipe {args.recipe} {wanted:,}. Give --tokens, which stretches"
                " the stages of all."
            )
        others[name] = other
    return others


def _parallel(args: argparse.Namespace, runtime: Runtime) -> int:
    """Processes to train in.

    Raises:
        UserError: ``--parallel`` is not positive, or torchrun started several processes for each run.
    """
    gpus = torch.cuda.device_count() if runtime.device.type == "cuda" else 0
    if runtime.processes > 1:
        if args.parallel is not None:
            raise UserError(
                "--parallel is for runs on one GPU each; under torchrun all GPUs train one run. Leave one out."
            )
        return 1
    parallel = max(1, gpus) if args.parallel is None else args.parallel
    if parallel < 1:
        raise UserError(f"--parallel is {parallel}: it must be at least 1.")
    return parallel


def train_controls(
    base: Path,
    workspace: Workspace,
    corpus: Corpus,
    recipe: Recipe,
    runtime: Runtime,
    shift: float,
    runs: Sequence[str] = tuple(RUNS),
    others: Mapping[str, Recipe] = MappingProxyType({}),
    parallel: int = 1,
) -> list[dict[str, Any]]:
    """Train and measure every run that an earlier process has not finished.

    Args:
        base: the dense model's folder.
        workspace: where results are kept.
        corpus: the recipe's text.
        recipe: ProSparse's recipe; the other control runs take from it what they share.
        runtime: device, printing and saving.
        shift: of the shifted ReLU, in units of the base's gate.
        runs: which of ``RUNS`` to make.
        others: further recipes, by name.
        parallel: runs to train at a time, each in a process of its own.

    Returns:
        One record per row of the table: ``name``, ``loss``, ``sparsity``, ``layers`` (sparsity of each), ``domains`` (``loss``
        and ``sparsity`` of each), ``history`` of its training; rows with a threshold have ``threshold`` and ``sweep``.
    """
    modeling.register()
    text, found = read_base(base, workspace, corpus, recipe, runtime)
    campaign = _Campaign(base, workspace, text, recipe, runtime, shift * found.gate_scale, tuple(runs), dict(others))
    controls = campaign.controls()
    todo = [name for name, control in controls.items() if workspace.result(control.slug) is None]
    # With several GPUs in sight, the Trainer would split every batch over all of them.
    if parallel > 1 or (runtime.processes == 1 and torch.cuda.device_count() > 1):
        print(f"{len(todo)} runs, {parallel} at a time; their progress is in {workspace.folder}/*.log", flush=True)
        side_by_side(campaign.run_logged, todo, parallel)
    else:
        for name in todo:
            campaign.run(name)
    results = [workspace.result(control.slug) for control in controls.values()]
    return [row for result in results if result is not None for row in result["rows"]]


@dataclass(frozen=True)
class _Campaign:
    """What all runs share: enough for any process to make any of them."""

    base: Path
    workspace: Workspace
    text: Text
    recipe: Recipe
    runtime: Runtime
    shift: float
    """Of the shifted ReLU, in the gate's own values."""
    runs: tuple[str, ...]
    others: dict[str, Recipe]

    def controls(self) -> dict[str, Control]:
        """The runs by name, in the table's order."""
        return {control.name: control for control in _controls(self.recipe, self.shift, self.runs, self.others)}

    def run(self, name: str) -> None:
        """Make one run, and record its rows."""
        control = self.controls()[name]
        rows = _train(control, self.base, self.workspace, self.text, self.runtime)
        self.workspace.record(control.slug, {"rows": rows})
        # Only now: a process that is killed here has lost nothing.
        if self.runtime.is_first:
            rmtree(_folder(control, self.workspace), ignore_errors=True)

    def run_logged(self, name: str) -> None:
        """``run`` in a process of its own: its progress goes to a file, which the others' does not cut up."""
        quieten_transformers()
        modeling.register()
        print(f"{name}: started", flush=True)
        with (self.workspace.folder / f"{_slug(name)}.log").open("a") as log, redirect_stdout(log):
            self.run(name)
        print(f"{name}: finished", flush=True)


def _controls(recipe: Recipe, shift: float, runs: Sequence[str], others: Mapping[str, Recipe]) -> list[Control]:
    stages = recipe.l1_schedule
    start, steps = stages.relu_steps, recipe.steps

    def relu(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_model(folder, dtype, hidden_act="relu")

    def shifted(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        model = relu(folder, dtype)
        for ffn in gated_ffns(model):
            ffn.act_fn = ShiftedReLU(shift)
        return model

    known = {
        "dense": Control(RUNS["dense"], recipe, load_model, None),
        "relu": Control(RUNS["relu"], recipe, relu, L1Schedule(steps, [])),
        "shifted": Control(RUNS["shifted"], recipe, shifted, L1Schedule(steps, [])),
        "fixed": Control(RUNS["fixed"], recipe, relu, L1Schedule(start, [Stage(steps, stages.stages[-1].peak)])),
        "prosparse": Control(RUNS["prosparse"], recipe, relu, stages, shifts_threshold=True),
    }
    return [
        *(control for name, control in known.items() if name in runs),
        *(Control(name, other, relu, weight_schedule(other), shifts_threshold=True) for name, other in others.items()),
    ]


def _train(control: Control, base: Path, workspace: Workspace, text: Text, runtime: Runtime) -> list[dict[str, Any]]:
    """Train and measure one control; returns its rows of the table, in the first process."""
    recipe = control.recipe
    print(f"\n{control.name}: {recipe.steps} steps", flush=True)
    folder = _folder(control, workspace)
    run = train(
        control.load(base, torch.float32),
        text,
        recipe.run,
        runtime,
        folder,
        schedule=control.schedule,
        l1=recipe.l1,
        decay_steps=recipe.last_stage_steps,
        logs=workspace.folder / "tensorboard" / folder.name,
    )
    if not runtime.is_first:
        return []
    model = control.load(run.folder, torch.bfloat16).to(runtime.device)
    rows = [_row(control.name, measure_domains(model, text)) | {"history": run.history}]
    if control.shifts_threshold:
        points = threshold.sweep(model, text.held_out, recipe.threshold)
        chosen = threshold.choose(points, recipe.threshold.budget, recipe.target_sparsity)
        with threshold.applied(model, chosen.threshold, chosen.factors):
            row = _row(control.name + comparison.WITH_THRESHOLD, measure_domains(model, text))
        rows.append(row | {"threshold": chosen.rounded(), "sweep": [point.rounded() for point in points]})
    for row in rows:
        print(f"{row['name']}: held-out loss {row['loss']:.4f}, sparsity {row['sparsity']:.2%}", flush=True)
    return rows


def _folder(control: Control, workspace: Workspace) -> Path:
    """Where the run's checkpoints are until it is recorded."""
    return workspace.folder / control.slug


def _row(name: str, measured: Mapping[str, Measurement]) -> dict[str, Any]:
    whole = combined(list(measured.values()))
    return {
        "name": name,
        "loss": whole.loss,
        "sparsity": whole.mean_sparsity,
        "layers": whole.sparsity.tolist(),
        "domains": {domain: {"loss": part.loss, "sparsity": part.mean_sparsity} for domain, part in measured.items()},
    }


def _write(workspace: Workspace, rows: Sequence[Mapping[str, Any]], recipe: Recipe, runtime: Runtime) -> str:
    """Write ``controls.md``, ``controls.json``, each run's history and the plots; returns the tables."""
    folder = workspace.checkpoint
    for row in rows:
        if "history" in row:
            write_history(folder / f"{_slug(row['name'])}.jsonl", row["history"])
    tables = "\n\n".join(comparison.tables(rows, RUNS["dense"]))
    plots = comparison.draw(folder, rows, RUNS["dense"])
    head = (
        f"# ProSparse and its controls\n\n```sh\n{command_line(NAME)}\n```\n\n{recipe.steps:,} steps of"
        f" {recipe.training.step_tokens:,} tokens each, seed {recipe.training.seed}, {device_name(runtime.device)}."
    )
    (folder / "controls.md").write_text(f"{head}\n\n{tables}\n{plots}")
    write_json(
        folder / "controls.json",
        {
            "command": command_line(NAME),
            "recipe": recipe.model_dump(mode="json"),
            "versions": versions(),
            "device": device_name(runtime.device),
            "rows": [{key: value for key, value in row.items() if key != "history"} for row in rows],
        },
    )
    return tables


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


if __name__ == "__main__":
    raise SystemExit(main(NAME, DESCRIPTION, add_arguments, run))
