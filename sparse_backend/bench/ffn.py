"""`prosparse bench ffn`: one feed-forward layer, the dense FFN that users have today against our op.

    prosparse bench ffn --device cpu --d-model 4096 --d-ff 11008 --density 0.107 --rows 1,2,4,8,16,64 --json

Calls go round several layers, more than the caches hold, and the variants take turns. On a CPU the rival is torch's dense FFN
(F.linear, F.threshold, a product, F.linear) and single calls are timed. On a GPU it is cuBLAS with a fused activation kernel, and
what is timed are replays of CUDA graphs that hold one call per layer. Every variant is held against float32 first.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from sparse_backend.bench import machine, rivals
from sparse_backend.bench.arguments import check_device, check_dtype, check_shape, densities, positive_ints
from sparse_backend.bench.machine import Machine
from sparse_backend.bench.paths import DTYPES
from sparse_backend.bench.patterns import (
    Frequencies,
    Independent,
    Pattern,
    PatternArgument,
    Recorded,
    pattern_argument,
    read_frequencies,
    read_recording,
)
from sparse_backend.errors import UserError
from sparse_backend.ffn import counters, native, paths, reference, sparse_gated_ffn, synthetic, timing
from sparse_backend.ffn.counters import DENSE, ROWS, SPARSE

_CPU_BYTES = 3 * 2**30 - 2**28  # of all layers, the rival's copy of down included
_CPU_LAYERS = 64
_CPU_CALLS = 45  # per variant and row count, at least
_CUDA_LAYERS = 32
_CUDA_CELL_S = 0.25  # per density and row count
_CUDA_REPLAYS = (10, 50)

# Largest difference from float32, as a share of its norm. What rounding gives is a third of it or less; a wrong kernel, far more.
_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}

Calls = list[Callable[[], torch.Tensor]]
"""The same computation on each of the layers."""


class FfnResult(TypedDict):
    """One shape, density and row count; times are medians, microseconds of one layer."""

    d_model: int
    d_ff: int
    wanted_density: float | None
    """As asked for; None where a file decides."""
    rows: int
    density: float
    """Measured share of active neurons, mean over rows."""
    union: float
    """Measured share of neurons active for at least one row of a call."""
    dense_us: float
    """The rival, in the same dtype."""
    sparse_us: float | None
    """Our op, held to the sparse path; None where it takes no so many rows."""
    auto_us: float
    """Our op, choosing its path by the table measured on this machine."""
    path: Literal["sparse", "dense"]
    """What it chose, for most layers."""
    speedup: float
    """dense_us / auto_us."""
    rival_us: float | None
    """The implementation given with --rival; None without one, or where it does not apply."""
    bytes: int
    """The least a layer must read: the gate, and the rows of up and down that the union needs."""
    bytes_per_s: float
    """bytes over auto_us."""


class FfnReport(TypedDict):
    """The whole output."""

    machine: Machine
    dtype: str
    pattern: str
    dense: str
    """What the dense rival is made of."""
    results: list[FfnResult]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.add_argument(
        "--d-model", type=positive_ints, default=[4096], metavar="N,N", help="model widths (default 4096)"
    )
    parser.add_argument(
        "--d-ff",
        type=positive_ints,
        default=[11008],
        metavar="N,N",
        help="neurons, one number per width (default 11008)",
    )
    parser.add_argument(
        "--density", type=densities, default=None, metavar="P,P", help="shares of active neurons (default 0.107)"
    )
    parser.add_argument(
        "--rows",
        type=positive_ints,
        default=[1, 2, 4, 8, 16, 64],
        metavar="N,N",
        help="row counts (default 1,2,4,8,16,64)",
    )
    parser.add_argument(
        "--pattern",
        type=pattern_argument,
        default=PatternArgument("independent", None),
        help="which neurons are active: independent (default), frequencies=FILE (prosparse.json, or .npz with freq_all),"
        " recorded=FILE (.npy of rows x neurons)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights and activations (default bfloat16)"
    )
    parser.add_argument(
        "--rival",
        type=Path,
        metavar="LIBRARY",
        help="also time the two operators of the ProSparse paper, from a shared library (7B shape, 1 row, GPU)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    check_device(arguments.device)
    native.require(arguments.device)
    check_dtype(arguments.dtype, arguments.device)
    shapes = _shapes(arguments)
    patterns = _patterns(arguments, shapes)
    rival = None if arguments.rival is None else _rival(arguments, shapes)
    device = torch.device(arguments.device)
    bench = Bench(device, DTYPES[arguments.dtype], rival)
    with torch.inference_mode():
        report: FfnReport = {
            "machine": machine.describe(device),
            "dtype": arguments.dtype,
            "pattern": str(arguments.pattern),
            "dense": bench.dense_name,
            "results": [
                result for d_model, d_ff in shapes for result in bench.measure(d_model, d_ff, patterns, arguments.rows)
            ],
        }
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0


def _shapes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    if len(arguments.d_model) != len(arguments.d_ff):
        raise UserError(
            f"--d-model names {len(arguments.d_model)} widths and --d-ff {len(arguments.d_ff)} numbers of neurons: give one per"
            " width."
        )
    shapes = list(zip(arguments.d_model, arguments.d_ff, strict=True))
    for d_model, d_ff in shapes:
        check_shape(d_model, d_ff)
    return shapes


def _patterns(arguments: argparse.Namespace, shapes: list[tuple[int, int]]) -> list[tuple[float | None, Pattern]]:
    """Each with the density asked for."""
    argument: PatternArgument = arguments.pattern
    if argument.file is None:
        return [(density, Independent(density)) for density in arguments.density or [0.107]]
    if arguments.density is not None:
        raise UserError("--density cannot be chosen with this --pattern, whose file decides. Leave one of them out.")
    if argument.kind == "frequencies":
        return [(None, Frequencies(read_frequencies(argument.file)))]
    most, narrowest = max(arguments.rows), min(d_model for d_model, _ in shapes)
    if most > narrowest // 2:
        raise UserError(
            f"--rows goes up to {most}, but --pattern recorded tells rows apart by input coordinates and takes up to half of"
            f" --d-model, {narrowest // 2}."
        )
    return [(None, Recorded(read_recording(argument.file), most))]


def _rival(arguments: argparse.Namespace, shapes: list[tuple[int, int]]) -> rivals.TwoOperatorFFN:
    d_model, d_ff = rivals.TwoOperatorFFN.D_MODEL, rivals.TwoOperatorFFN.D_FF
    if (
        arguments.device != "cuda"
        or arguments.dtype != "bfloat16"
        or (d_model, d_ff) not in shapes
        or 1 not in arguments.rows
    ):
        raise UserError(
            f"--rival is for --device cuda, --dtype bfloat16, --d-model {d_model}, --d-ff {d_ff} and 1 row: the operators know"
            " no other. Add these, or leave it out."
        )
    return rivals.TwoOperatorFFN(arguments.rival)


def torch_dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, threshold: float) -> torch.Tensor:
    """The rival on a CPU: x [rows, d_model], gate_up [2 * d_ff, d_model], down [d_model, d_ff]."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=1)
    return F.linear(F.threshold(gate, threshold, 0.0) * up, down)


@dataclass(frozen=True)
class _Case:
    """What one row count is measured on."""

    x: torch.Tensor
    layers: Sequence[synthetic.Layer]
    downs: Sequence[torch.Tensor]
    """Each layer's down projection as the rival takes it, [d_model, d_ff]."""
    limits: Sequence[int]
    """Each layer's ``max_sparse_rows``."""


class Bench:
    """Measures shapes on one device in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rival: rivals.TwoOperatorFFN | None = None) -> None:
        self._device = device
        self._dtype = dtype
        self._rival = rival
        self._unused = counters.new_counters(device)
        if device.type == "cuda":
            activation = rivals.fused_activation(synthetic.THRESHOLD)
            self._activation = activation.kernel
            self.dense_name = f"cuBLAS, {activation.name}, cuBLAS"
        else:
            self.dense_name = "torch's F.linear, F.threshold, product, F.linear"

    def measure(
        self, d_model: int, d_ff: int, patterns: list[tuple[float | None, Pattern]], row_list: list[int]
    ) -> list[FfnResult]:
        """Time every pattern (with the density asked for) and row count on layers of one shape."""
        generator = torch.Generator(self._device).manual_seed(0)
        draws = torch.Generator().manual_seed(0)
        layers = [
            synthetic.Layer.random(self._dtype, d_model, d_ff, generator)
            for _ in range(self._layer_count(d_model, d_ff))
        ]
        downs = [layer.down_t.t().contiguous() for layer in layers]
        results = []
        for wanted_density, pattern in patterns:
            limits = [
                paths.max_sparse_rows(self._dtype, d_model, d_ff, pattern.density(index), self._device.type)
                for index in range(len(layers))
            ]
            for rows in row_list:
                for index, layer in enumerate(layers):
                    pattern.apply(layer, index, rows, draws)
                x = pattern.inputs(rows, self._dtype, d_model, generator)
                results.append(self._measure_rows(_Case(x, layers, downs, limits), wanted_density))
        return results

    def _layer_count(self, d_model: int, d_ff: int) -> int:
        layer_bytes = 4 * d_model * d_ff * self._dtype.itemsize
        cache = synthetic.cache_bytes(self._device)
        if self._device.type == "cuda":
            # At low densities little more than the gate, a quarter of these bytes, is read of a layer.
            wanted = max(_CUDA_LAYERS, -(-8 * cache // (layer_bytes // 4)))
            return max(1, min(wanted, torch.cuda.mem_get_info(self._device)[0] // 2 // layer_bytes))
        wanted = max(3, -(-4 * cache // layer_bytes))
        return max(1, min(wanted, _CPU_LAYERS, _CPU_BYTES // layer_bytes))

    def _measure_rows(self, case: _Case, wanted_density: float | None) -> FfnResult:
        (rows, d_model), d_ff = case.x.shape, case.layers[0].d_ff
        counted = counters.new_counters(self._device)
        for call in self._ours(case, case.limits, counted):
            call()
        variants = self._variants(case)
        times = (self._cuda_times if self._device.type == "cuda" else self._cpu_times)(case, variants)
        counts = counted.cpu()
        union = counters.union_density(counts, d_ff) or 0.0
        least_bytes = round(d_model * d_ff * self._dtype.itemsize * (1 + 2 * union))
        return {
            "d_model": d_model,
            "d_ff": d_ff,
            "wanted_density": wanted_density,
            "rows": rows,
            "density": round(counters.density(counts, d_ff) or 0.0, 4),
            "union": round(union, 4),
            "dense_us": round(times["dense"], 2),
            "sparse_us": round(times["sparse"], 2) if "sparse" in times else None,
            "auto_us": round(times["auto"], 2),
            "path": "sparse" if counts[SPARSE, ROWS] > counts[DENSE, ROWS] else "dense",
            "speedup": round(times["dense"] / times["auto"], 3),
            "rival_us": round(times["rival"], 2) if "rival" in times else None,
            "bytes": least_bytes,
            "bytes_per_s": round(least_bytes / times["auto"] * 1e6),
        }

    def _variants(self, case: _Case) -> dict[str, Calls]:
        rows, d_model = case.x.shape
        variants: dict[str, Calls] = {
            "dense": [
                functools.partial(self._dense, case.x, layer.gate_up, down)
                for layer, down in zip(case.layers, case.downs, strict=True)
            ],
            "auto": self._ours(case, case.limits, self._unused),
        }
        if rows <= paths.largest_sparse_rows(self._dtype, d_model, self._device.type):
            variants["sparse"] = self._ours(case, [paths.ALWAYS_SPARSE] * len(case.layers), self._unused)
        known = (rivals.TwoOperatorFFN.D_MODEL, rivals.TwoOperatorFFN.D_FF)
        if self._rival is not None and rows == 1 and (d_model, case.layers[0].d_ff) == known:
            variants["rival"] = [
                functools.partial(self._rival, case.x, layer.gate_up, layer.down_t, synthetic.THRESHOLD)
                for layer in case.layers
            ]
        return variants

    def _dense(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch_dense_ffn(x, gate_up, down, synthetic.THRESHOLD)
        return F.linear(self._activation(F.linear(x, gate_up)), down)

    def _ours(self, case: _Case, limits: Sequence[int], counted: torch.Tensor) -> Calls:
        return [
            functools.partial(
                sparse_gated_ffn, case.x, layer.gate_up, layer.down_t, synthetic.THRESHOLD, counted, limit
            )
            for layer, limit in zip(case.layers, limits, strict=True)
        ]

    def _cuda_times(self, case: _Case, variants: Mapping[str, Calls]) -> dict[str, float]:
        recordings = {
            name: timing.record(calls, self._rival.stream if name == "rival" and self._rival else None)
            for name, calls in variants.items()
        }
        for name, recording in recordings.items():
            for output in recording.outputs:
                output.fill_(torch.nan)
            recording.graph.replay()
            for index in (0, -1):
                _check(name, recording.outputs[index], case.x, case.layers[index])
        graphs = {name: recording.graph for name, recording in recordings.items()}
        medians = timing.medians_us(graphs, seconds=_CUDA_CELL_S, replays=_CUDA_REPLAYS)
        return {name: median / len(case.layers) for name, median in medians.items()}

    def _cpu_times(self, case: _Case, variants: Mapping[str, Calls]) -> dict[str, float]:
        for name, calls in variants.items():
            _check(name, calls[0](), case.x, case.layers[0])
        times: dict[str, list[float]] = {name: [] for name in variants}
        rounds = -(-_CPU_CALLS // len(case.layers))
        position = 0
        for round_ in range(rounds + 1):
            # Every variant runs through all layers; who begins changes from round to round.
            for _ in case.layers:
                for name in list(variants)[:: 1 if round_ % 2 == 0 else -1]:
                    call = variants[name][position % len(case.layers)]
                    position += 1
                    start = time.perf_counter()
                    call()
                    elapsed = (time.perf_counter() - start) * 1e6
                    if round_ > 0:
                        times[name].append(elapsed)
        return {name: statistics.median(samples) for name, samples in times.items()}


def _check(variant: str, y: torch.Tensor, x: torch.Tensor, layer: synthetic.Layer) -> None:
    """Refuse to time what computes something else.

    Raises:
        UserError: ``y`` is further from float32 than rounding to its dtype explains, or not a number.
    """
    unused = counters.new_counters(x.device)
    exact = reference.sparse_gated_ffn(x.float(), layer.gate_up, layer.down_t, synthetic.THRESHOLD, unused)
    difference, norm = (y.float() - exact).norm().item(), exact.norm().item()
    # Written so that NaN is refused as well.
    if not difference <= _TOLERANCES[y.dtype] * norm:
        raise UserError(
            f"{variant} is wrong for {x.shape[0]} rows of {x.shape[1]} x {layer.d_ff}: it differs from float32 by"
            f" {difference:.3g}, where the result's norm is {norm:.3g}. A wrong result is not timed."
        )


def _print(report: FfnReport) -> None:
    where = report["machine"]
    threads = "" if where["threads"] is None else f", {where['threads']} threads"
    rate = where["read_bytes_per_s"]
    console = Console()
    console.print(
        f"{report['dtype']}, {report['pattern']}, {where['name']}, {where['kernels']}{threads};"
        f" memory reads {rate / 1e9:.0f} GB/s at most"
    )
    console.print(f"dense: {report['dense']}")
    for (d_model, d_ff), results in itertools.groupby(
        report["results"], key=lambda result: (result["d_model"], result["d_ff"])
    ):
        console.print(_table(f"{d_model} x {d_ff}, µs a layer", list(results), rate))


def _table(title: str, results: list[FfnResult], read_rate: float) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
    with_rival = any(result["rival_us"] is not None for result in results)
    columns = ("rows", "density", "union", "dense", "sparse", "auto", "path", "speed-up", "reads")
    for column in (*columns, *(["rival"] if with_rival else [])):
        table.add_column(column, justify="right")
    for result in results:
        cells = [
            f"{result['rows']}",
            f"{result['density']:.3f}",
            f"{result['union']:.3f}",
            _microseconds(result["dense_us"]),
            _microseconds(result["sparse_us"]),
            _microseconds(result["auto_us"]),
            result["path"],
            f"{result['speedup']:.2f}",
            f"{result['bytes_per_s'] / read_rate:.0%}",
        ]
        table.add_row(*cells, *([_microseconds(result["rival_us"])] if with_rival else []))
    return table


def _microseconds(time_us: float | None) -> str:
    return "–" if time_us is None else f"{time_us:.{1 if time_us < 1000 else 0}f}"
