"""`prosparse bench decode`: tokens per second of whole decode steps through vLLM, dense against auto.

One engine per path, each in its own process, measured in turn so that a drifting machine treats both alike. A round's decode
time is the time of a long generation less the time of a one-token generation of the same prompts.
"""

import argparse
import contextlib
import json
import statistics
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from sparse_backend.bench.arguments import ENGINE_DTYPES, positive_int, row_counts
from sparse_backend.bench.engine import Engine, EngineOptions
from sparse_backend.bench.prompts import PROMPT_TOKENS, check_context, held_out_prompts
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.ffn import native


class DecodeResult(TypedDict):
    """One batch size; rates are tokens per second over all sequences, medians of the rounds."""

    batch: int
    dense_tok_s: float
    auto_tok_s: float
    speedup: float
    """Median over rounds of auto's rate over dense's in the same round."""
    stock_tok_s: float | None
    """vLLM's own LLaMA class (Swish, other text) on weights of the same shape; None unless asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="checkpoint folder")
    parser.add_argument(
        "--batch", type=row_counts, default=[1, 8], metavar="N,N", help="sequences decoded together (default 1,8)"
    )
    parser.add_argument("--tokens", type=positive_int, default=128, help="decode steps per generation (default 128)")
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="generations per path and batch size (default 7)"
    )
    parser.add_argument(
        "--dtype", choices=ENGINE_DTYPES, default="auto", help="dtype of the engine (default: the checkpoint's)"
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--stock", action="store_true", help="also time vLLM's own dense Swish LLaMA of the same shape")
    parser.add_argument(
        "--corpus", default="stdlib", help="where prompts come from (default: the standard library's sources)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    native.require()
    checkpoint = Checkpoint.open(arguments.model)
    check_context(checkpoint, 1 + arguments.tokens)
    results = measure(
        checkpoint,
        arguments.batch,
        tokens=arguments.tokens,
        rounds=arguments.rounds,
        dtype=arguments.dtype,
        eager=arguments.eager,
        stock=arguments.stock,
        corpus=arguments.corpus,
    )
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    table = Table(title=f"decode, {arguments.model}, tokens/s")
    for column in ("batch", "dense", "auto", "speed-up", *(["vLLM's own Swish"] if arguments.stock else [])):
        table.add_column(column, justify="right")
    for result in results:
        cells = [
            f"{result['batch']}",
            f"{result['dense_tok_s']:.0f}",
            f"{result['auto_tok_s']:.0f}",
            f"{result['speedup']:.3f}",
        ]
        table.add_row(*cells, *([f"{result['stock_tok_s']:.0f}"] if arguments.stock else []))
    Console().print(table)
    return 0


def measure(
    checkpoint: Checkpoint,
    batches: list[int],
    *,
    tokens: int,
    rounds: int,
    dtype: str,
    eager: bool,
    stock: bool,
    corpus: str,
) -> list[DecodeResult]:
    """Time every batch size on every path, the paths in turn within each round."""
    most = max(batches)
    prompts = held_out_prompts(checkpoint.folder, corpus, most, PROMPT_TOKENS)
    variants = {"dense": EngineOptions("dense"), "auto": EngineOptions("auto")}
    if stock:
        variants["stock"] = EngineOptions("dense", stock=True)
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, options in variants.items():
            options = EngineOptions(options.ffn_path, dtype, eager, max_num_seqs=most, stock=options.stock)
            engines[name] = stack.enter_context(Engine(checkpoint, options))
            engines[name].wait_ready()
        return [_measure_batch(engines, prompts[:batch], tokens, rounds) for batch in batches]


def _measure_batch(engines: dict[str, Engine], prompts: list[list[int]], tokens: int, rounds: int) -> DecodeResult:
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds + 1):
        # Alternate who goes first: whatever the machine does every other moment hits both.
        for name in list(engines)[:: 1 if round_ % 2 == 0 else -1]:
            _, prefill = engines[name].generate(prompts, 1)
            _, whole = engines[name].generate(prompts, 1 + tokens)
            if round_ > 0:
                rates[name].append(len(prompts) * tokens / (whole - prefill))
    ratios = [auto / dense for auto, dense in zip(rates["auto"], rates["dense"], strict=True)]
    return {
        "batch": len(prompts),
        "dense_tok_s": round(statistics.median(rates["dense"]), 1),
        "auto_tok_s": round(statistics.median(rates["auto"]), 1),
        "speedup": round(statistics.median(ratios), 4),
        "stock_tok_s": round(statistics.median(rates["stock"]), 1) if "stock" in rates else None,
    }
