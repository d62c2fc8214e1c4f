"""`prosparse bench parity`: the sparse path gives the dense path's tokens, and its counters count what they say.

Two float32 engines, one per path, continue the same held-out prompts greedily. A sequence may part only where the two most
likely tokens are a near-tie; such places are printed. Counters are held against a plain PyTorch count over the same gate
values (must be equal) and over gates recomputed in float64 (may differ by neurons within rounding of the threshold).
"""

import argparse
import json
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table

from sparse_backend.bench.arguments import positive_int
from sparse_backend.bench.engine import Engine, EngineOptions, Generation
from sparse_backend.bench.prompts import PROMPT_TOKENS, check_context, held_out_prompts
from sparse_backend.bench.recording import LayerRecount
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.ffn import native


class Parting(TypedDict):
    """The first place where a sequence's two continuations differ."""

    prompt: int
    position: int
    gap: float
    """Difference of the two highest log-probabilities there, on the dense path (equals that of the logits), nats."""


class ParityResult(TypedDict):
    """The whole comparison."""

    prompts: int
    tokens: int
    identical: int
    partings: list[Parting]
    tolerance: float
    layers: dict[str, list[LayerRecount]]
    """Recounts by path."""
    ok: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("--prompts", type=positive_int, default=64, help="held-out prompts (default 64)")
    parser.add_argument("--tokens", type=positive_int, default=64, help="greedy tokens per prompt (default 64)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest gap of a near-tie, nats (default 1e-4)")
    parser.add_argument(
        "--corpus", default="stdlib", help="where prompts come from (default: the standard library's sources)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; exit status 1 if the paths differ by more than allowed."""
    if torch.cuda.is_available():
        raise UserError(
            "This compares in float32, for which a GPU has no sparse kernels: it would compare the dense path with itself. Run it"
            " on a machine without a GPU; tests/gpu compares the paths on one."
        )
    native.require("cpu")
    checkpoint = Checkpoint.open(arguments.model)
    check_context(checkpoint, arguments.tokens)
    result = compare(
        checkpoint,
        prompts=arguments.prompts,
        tokens=arguments.tokens,
        tolerance=arguments.tolerance,
        corpus=arguments.corpus,
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)
    return 0 if result["ok"] else 1


def compare(checkpoint: Checkpoint, *, prompts: int, tokens: int, tolerance: float, corpus: str) -> ParityResult:
    """Run both paths on the same prompts, in float32, without compilation (recording needs module hooks)."""
    texts = held_out_prompts(checkpoint.folder, corpus, prompts, PROMPT_TOKENS)
    generations: dict[str, list[Generation]] = {}
    layers: dict[str, list[LayerRecount]] = {}
    for path in ("dense", "sparse"):
        with Engine(checkpoint, EngineOptions(path, dtype="float32", eager=True)) as engine:
            engine.wait_ready()
            engine.start_recording()
            generations[path], _ = engine.generate(texts, tokens, top_logprobs=True)
            layers[path] = engine.stop_recording()
    partings = find_partings(generations["dense"], generations["sparse"])
    counted = all(
        layer["counters"] == layer["same_gates"] and layer["moved_beyond_rounding"] == 0
        for recounts in layers.values()
        for layer in recounts
    )
    return {
        "prompts": prompts,
        "tokens": tokens,
        "identical": prompts - len(partings),
        "partings": partings,
        "tolerance": tolerance,
        "layers": layers,
        "ok": counted and all(parting["gap"] <= tolerance for parting in partings),
    }


def find_partings(dense: list[Generation], sparse: list[Generation]) -> list[Parting]:
    """Where each pair of continuations first differs; what follows a parting is not comparable."""
    partings: list[Parting] = []
    for prompt, (one, other) in enumerate(zip(dense, sparse, strict=True)):
        for position, (token, other_token) in enumerate(zip(one.tokens, other.tokens, strict=True)):
            if token != other_token:
                best, second = one.top_logprobs[position]
                partings.append({"prompt": prompt, "position": position, "gap": best - second})
                break
    return partings


def _print(result: ParityResult) -> None:
    console = Console()
    console.print(
        f"{result['identical']} of {result['prompts']} sequences of {result['tokens']} greedy tokens are the same on both paths"
    )
    for parting in result["partings"]:
        within = "within" if parting["gap"] <= result["tolerance"] else "BEYOND"
        console.print(
            f"  prompt {parting['prompt']} parts at token {parting['position']}: gap of the two best logits {parting['gap']:.2e},"
            f" {within} {result['tolerance']:g}"
        )
    for path, recounts in result["layers"].items():
        table = Table(title=f"counters, {path} path")
        for column in (
            "layer",
            "rows",
            "active",
            "union",
            "equal to PyTorch's count",
            "moved in float64",
            "of gates",
            "beyond rounding",
        ):
            table.add_column(column, justify="right")
        for layer in recounts:
            counters = layer["counters"]
            table.add_row(
                f"{layer['layer']}",
                f"{counters['rows']}",
                f"{counters['active']}",
                f"{counters['union']}",
                "yes" if counters == layer["same_gates"] else "NO",
                f"{layer['moved']}",
                f"{layer['gates']}",
                f"{layer['moved_beyond_rounding']}",
            )
        console.print(table)
    console.print("same tokens, counters right" if result["ok"] else "NOT the same: see above")
