"""`prosparse bench decode`: whole decode steps through vLLM, dense against auto.

    prosparse bench decode --model deploy/demo --batch 1,8 --stock
    prosparse bench decode --synthetic 7b --density 0.107 --batch 1,2,4,8,16,32,64 --prefill 2048 --fp8
    prosparse bench decode --synthetic 13b --tensor-parallel-size 2 --batch 1,8

One engine per variant, each in its own process, measured in turn so that a drifting machine treats all alike. A round's decode
time is the time of a long generation less the time of a one-token generation of the same prompts. Runs on the GPU where there is
one.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table

from sparse_backend.bench import machine
from sparse_backend.bench.arguments import ENGINE_DTYPES, check_dtype, densities, positive_int, positive_ints
from sparse_backend.bench.engine import Engine, EngineOptions
from sparse_backend.bench.machine import Machine
from sparse_backend.bench.prompts import PROMPT_TOKENS, check_context, held_out_prompts
from sparse_backend.bench.synthetic_model import SHAPES, SyntheticModel, write_config
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.ffn import native, paths
from sparse_backend.vllm_plugin.snapshot import PATHS, SparsitySnapshot

_LEAST_KV_CACHE_BYTES = 1 << 30
_KV_BLOCK_TOKENS = 32  # of each sequence: its last block may be part empty


class DecodeCounts(TypedDict):
    """What the counters of the auto variant say of the decode steps of one batch size."""

    density: float
    """Share of active neurons, mean over rows and layers."""
    union: float
    """Share of neurons active for at least one row of a step, mean over steps and layers."""
    sparse_steps: float
    """Share of steps, counted per layer, that took the sparse path."""


class DecodeResult(DecodeCounts):
    """One batch size; rates are tokens per second over all sequences, medians of the rounds."""

    batch: int
    dense_tok_s: float
    auto_tok_s: float
    speedup: float
    """Median over rounds of auto's rate over dense's in the same round."""
    stock_tok_s: float | None
    """vLLM's own LLaMA class (Swish, other text) on weights of the same shape; None unless asked for."""
    fp8_tok_s: float | None
    """The same with quantization="fp8"; None unless asked for."""


class PrefillResult(TypedDict):
    """One prompt, read by itself; medians of the rounds."""

    tokens: int
    dense_ms: float
    auto_ms: float
    speedup: float
    """Median over rounds of dense's time over auto's in the same round."""
    stock_ms: float | None
    fp8_ms: float | None


class DecodeReport(TypedDict):
    """The whole output."""

    machine: Machine
    model: str
    dtype: str
    decode: list[DecodeResult]
    prefill: PrefillResult | None
    devices: int
    same_tokens_as_one_device: bool | None
    """Did every variant of ours continue the prompts as the sparse path does on one device? None for one device."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    batches: list[int]
    tokens: int
    """Decode steps per generation."""
    rounds: int
    prefill: int | None = None
    """Tokens of a prompt whose reading is timed as well."""
    dtype: str = "auto"
    eager: bool = False
    stock: bool = False
    fp8: bool = False
    corpus: str = "stdlib"
    tensor_parallel_size: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", help="checkpoint folder")
    model.add_argument(
        "--synthetic", choices=SHAPES, help="random weights of this shape, made on loading, in place of a checkpoint"
    )
    parser.add_argument(
        "--density",
        type=densities,
        default=None,
        metavar="P",
        help="with --synthetic: share of active neurons (default 0.107)",
    )
    parser.add_argument(
        "--frequencies",
        type=Path,
        metavar="FILE",
        help="with --synthetic: how often each neuron is active (a prosparse.json, or an .npz with freq_all)",
    )
    parser.add_argument(
        "--batch", type=positive_ints, default=[1, 8], metavar="N,N", help="sequences decoded together (default 1,8)"
    )
    parser.add_argument("--tokens", type=positive_int, default=128, help="decode steps per generation (default 128)")
    parser.add_argument(
        "--prefill", type=positive_int, metavar="N", help="also time the reading of one prompt of so many tokens"
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="generations per path and batch size (default 7)"
    )
    parser.add_argument(
        "--dtype", choices=ENGINE_DTYPES, default="auto", help="dtype of the engine (default: the checkpoint's)"
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=positive_int,
        default=1,
        metavar="N",
        help="devices that share each layer (default 1); with several, tokens are compared with those of one",
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--stock", action="store_true", help="also time vLLM's own dense Swish LLaMA of the same shape")
    parser.add_argument("--fp8", action="store_true", help="also time that with quantization=fp8 (GPU)")
    parser.add_argument(
        "--corpus", default="stdlib", help="where prompts come from (default: the standard library's sources)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    native.require(device_type)
    check_dtype(arguments.dtype, device_type)
    if arguments.fp8 and device_type == "cpu":
        raise UserError("--fp8 needs a GPU: vLLM quantises to FP8 there only. Leave it out.")
    plan = Plan(
        batches=arguments.batch,
        tokens=arguments.tokens,
        rounds=arguments.rounds,
        prefill=arguments.prefill,
        dtype=arguments.dtype,
        eager=arguments.eager,
        stock=arguments.stock,
        fp8=arguments.fp8,
        corpus=arguments.corpus,
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    with _model(arguments) as (checkpoint, synthetic):
        check_context(checkpoint, 1 + plan.tokens)
        if (plan.stock or plan.fp8) and checkpoint.model_class != "SparseLlamaForCausalLM":
            raise UserError(
                "--stock and --fp8 run vLLM's own LLaMA class, but this checkpoint is no LLaMA. Leave them out."
            )
        if plan.prefill is not None and plan.prefill >= checkpoint.context_length:
            raise UserError(
                f"--prefill is {plan.prefill}, but the model's context of {checkpoint.context_length} tokens must hold one more."
            )
        report = measure(checkpoint, plan, synthetic)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0


@contextlib.contextmanager
def _model(arguments: argparse.Namespace) -> Iterator[tuple[Checkpoint, SyntheticModel | None]]:
    if arguments.model is not None:
        if arguments.density is not None or arguments.frequencies is not None:
            raise UserError(
                "--density and --frequencies are for --synthetic; a checkpoint has its own. Leave them out."
            )
        yield Checkpoint.open(arguments.model), None
        return
    wanted = arguments.density or [0.107]
    if len(wanted) > 1 or (arguments.density is not None and arguments.frequencies is not None):
        raise UserError("Give one --density or one --frequencies, for one model.")
    model = SyntheticModel(SHAPES[arguments.synthetic], wanted[0], arguments.frequencies)
    model.layer_frequencies()  # refuses a file that cannot be used before engines start
    with tempfile.TemporaryDirectory(prefix="prosparse-") as folder:
        yield write_config(Path(folder), model.shape), model


def measure(checkpoint: Checkpoint, plan: Plan, synthetic: SyntheticModel | None = None) -> DecodeReport:
    """Time every batch size, and the prefill, on every variant."""
    most = max(plan.batches)
    lengths = {"decode": PROMPT_TOKENS, **({} if plan.prefill is None else {"prefill": plan.prefill})}
    prompts = {
        name: synthetic.prompts(most, length)
        if synthetic
        else held_out_prompts(checkpoint.folder, plan.corpus, most, length)
        for name, length in lengths.items()
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = machine.describe(device)
    tokens = {}
    with _engines(checkpoint, plan, synthetic, device) as engines:
        report: DecodeReport = {
            "machine": described,
            "model": _describe(checkpoint, synthetic),
            "dtype": checkpoint.engine_dtype(plan.dtype, float16=device.type == "cuda"),
            "decode": [
                _measure_batch(engines, prompts["decode"][:batch], plan.tokens, plan.rounds) for batch in plan.batches
            ],
            "prefill": _measure_prefill(engines, prompts["prefill"][0], plan.rounds) if "prefill" in prompts else None,
            "devices": plan.tensor_parallel_size,
            "same_tokens_as_one_device": None,
        }
        if plan.tensor_parallel_size > 1:
            tokens = {name: _tokens(engines[name], prompts["decode"], plan.tokens) for name in ("dense", "auto")}
    if tokens:
        options = replace(_options(checkpoint, plan, synthetic), tensor_parallel_size=1)
        with Engine(checkpoint, options) as alone:
            alone.wait_ready()
            expected = _tokens(alone, prompts["decode"], plan.tokens)
        report["same_tokens_as_one_device"] = all(each == expected for each in tokens.values())
    return report


def _tokens(engine: Engine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    return [generation.tokens for generation in engine.generate(prompts, 1 + tokens)[0]]


def _options(checkpoint: Checkpoint, plan: Plan, synthetic: SyntheticModel | None) -> EngineOptions:
    """What all variants have in common."""
    return EngineOptions(
        "auto",
        dtype=plan.dtype,
        eager=plan.eager,
        max_num_seqs=max(plan.batches),
        synthetic=synthetic,
        max_model_len=max(PROMPT_TOKENS + plan.tokens, plan.prefill or 0) + 1,
        kv_cache_bytes=_kv_cache_bytes(checkpoint, plan),
        tensor_parallel_size=plan.tensor_parallel_size,
    )


def _describe(checkpoint: Checkpoint, synthetic: SyntheticModel | None) -> str:
    if synthetic is None:
        return str(checkpoint.folder)
    shape = synthetic.shape
    activity = synthetic.frequencies.name if synthetic.frequencies else f"density {synthetic.density:g}"
    return f"synthetic, {shape.num_hidden_layers} layers of {shape.hidden_size} x {shape.intermediate_size}, {activity}"


@contextlib.contextmanager
def _engines(
    checkpoint: Checkpoint, plan: Plan, synthetic: SyntheticModel | None, device: torch.device
) -> Iterator[dict[str, Engine]]:
    """The variants' engines, all ready."""
    auto = _options(checkpoint, plan, synthetic)
    variants = {"dense": replace(auto, ffn_path="dense"), "auto": auto}
    if plan.stock:
        variants["stock"] = replace(variants["dense"], stock=True)
    if plan.fp8:
        variants["fp8"] = replace(variants["dense"], stock=True, quantization="fp8")
    on_cuda = device.type == "cuda"
    if on_cuda:
        _measure_paths(checkpoint, plan)
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, options in variants.items():
            options = replace(options, gpu_share=0.9 / len(variants) if on_cuda else None)
            engines[name] = stack.enter_context(Engine(checkpoint, options))
            if not on_cuda:
                engines[name].wait_ready()
        # Starting is mostly compiling: on a GPU machine there are CPU cores to do it side by side.
        for engine in engines.values() if on_cuda else ():
            engine.wait_ready()
        yield engines


def _measure_paths(checkpoint: Checkpoint, plan: Plan) -> None:
    """Have the table of limits in the cache before the engines, which start side by side on one GPU, ask for it."""
    dtype = getattr(torch, checkpoint.engine_dtype(plan.dtype, float16=True))
    d_model = checkpoint.config["hidden_size"]
    d_ff = checkpoint.config["intermediate_size"] // plan.tensor_parallel_size
    paths.max_sparse_rows(dtype, d_model, d_ff, None, "cuda")
    torch.cuda.empty_cache()


def _kv_cache_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Enough that no sequence waits for room."""
    config = checkpoint.config
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    itemsize = getattr(torch, checkpoint.engine_dtype(plan.dtype, float16=True)).itemsize
    token_bytes = 2 * config["num_hidden_layers"] * kv_heads * head * itemsize
    tokens = max(max(plan.batches) * (PROMPT_TOKENS + plan.tokens + _KV_BLOCK_TOKENS), 2 * (plan.prefill or 0))
    return max(_LEAST_KV_CACHE_BYTES, token_bytes * tokens)


def _measure_batch(engines: dict[str, Engine], prompts: list[list[int]], tokens: int, rounds: int) -> DecodeResult:
    rates: dict[str, list[float]] = {name: [] for name in engines}
    counts = _decode_counts(engines["auto"], prompts, tokens)
    for round_ in range(rounds + 1):
        # Alternate who goes first: whatever the machine does every other moment hits both.
        for name in list(engines)[:: 1 if round_ % 2 == 0 else -1]:
            _, prefill = engines[name].generate(prompts, 1)
            _, whole = engines[name].generate(prompts, 1 + tokens)
            if round_ > 0:
                rates[name].append(len(prompts) * tokens / (whole - prefill))
    ratios = [auto / dense for auto, dense in zip(rates["auto"], rates["dense"], strict=True)]
    medians = {name: round(statistics.median(samples), 1) for name, samples in rates.items()}
    return {
        "batch": len(prompts),
        "dense_tok_s": medians["dense"],
        "auto_tok_s": medians["auto"],
        "speedup": round(statistics.median(ratios), 4),
        "stock_tok_s": medians.get("stock"),
        "fp8_tok_s": medians.get("fp8"),
        **counts,
    }


def _measure_prefill(engines: dict[str, Engine], prompt: list[int], rounds: int) -> PrefillResult:
    times: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds + 1):
        for name in list(engines)[:: 1 if round_ % 2 == 0 else -1]:
            _, seconds = engines[name].generate([prompt], 1)
            if round_ > 0:
                times[name].append(seconds * 1e3)
    ratios = [dense / auto for auto, dense in zip(times["auto"], times["dense"], strict=True)]
    medians = {name: round(statistics.median(samples), 3) for name, samples in times.items()}
    return {
        "tokens": len(prompt),
        "dense_ms": medians["dense"],
        "auto_ms": medians["auto"],
        "speedup": round(statistics.median(ratios), 4),
        "stock_ms": medians.get("stock"),
        "fp8_ms": medians.get("fp8"),
    }


def _decode_counts(engine: Engine, prompts: list[list[int]], tokens: int) -> DecodeCounts:
    """Counters of a long generation less those of a one-token generation of the same prompts."""
    before = _totals(engine.snapshot())
    engine.generate(prompts, 1)
    prefill = _totals(engine.snapshot())
    engine.generate(prompts, 1 + tokens)
    whole = _totals(engine.snapshot())
    decode = {name: whole[name] - 2 * prefill[name] + before[name] for name in whole}
    return {
        "density": round(decode["active"] / decode["gates"], 4),
        "union": round(decode["union"] / decode["neurons"], 4),
        "sparse_steps": round(decode["sparse_steps"] / decode["steps"], 4),
    }


def _totals(snapshot: SparsitySnapshot) -> dict[str, int]:
    """Sums over layers and paths; ``gates`` and ``neurons`` are what ``active`` and ``union`` could have been at most."""
    totals = dict.fromkeys(("active", "union", "steps", "sparse_steps", "gates", "neurons"), 0)
    for layer in snapshot["layers"]:
        for path in PATHS:
            counts = layer["paths"][path]
            totals["active"] += counts["active"]
            totals["union"] += counts["union"]
            totals["steps"] += counts["steps"]
            totals["sparse_steps"] += counts["steps"] if path == "sparse" else 0
            totals["gates"] += counts["rows"] * layer["d_ff"]
            totals["neurons"] += counts["steps"] * layer["d_ff"]
    return totals


def _print(report: DecodeReport) -> None:
    where = report["machine"]
    console = Console()
    devices = f"{report['devices']} x " if report["devices"] > 1 else ""
    console.print(f"{report['model']}, {report['dtype']}, {devices}{where['name']}, {where['kernels']}")
    others = [name for name in ("stock", "fp8") if report["decode"][0][f"{name}_tok_s"] is not None]  # type: ignore[literal-required]
    table = Table(title="decode, milliseconds per step")
    for column in ("batch", "dense", "auto", "speed-up", *others, "density", "union", "sparse steps"):
        table.add_column(column, justify="right")
    for result in report["decode"]:
        rates = [result["dense_tok_s"], result["auto_tok_s"], *(result[f"{name}_tok_s"] for name in others)]  # type: ignore[literal-required]
        dense, auto, *rest = [f"{result['batch'] / rate * 1e3:.3f}" for rate in rates]
        table.add_row(
            f"{result['batch']}",
            dense,
            auto,
            f"{result['speedup']:.3f}",
            *rest,
            f"{result['density']:.3f}",
            f"{result['union']:.3f}",
            f"{result['sparse_steps']:.0%}",
        )
    console.print(table)
    prefill = report["prefill"]
    if prefill is not None:
        times = [f"{name} {prefill[f'{name}_ms']:.2f} ms" for name in ("dense", "auto", *others)]  # type: ignore[literal-required]
        console.print(f"prompt of {prefill['tokens']} tokens: {', '.join(times)}, speed-up {prefill['speedup']:.3f}")
    if report["same_tokens_as_one_device"] is not None:
        console.print(f"tokens {'as' if report['same_tokens_as_one_device'] else 'OTHER THAN'} on one device")
