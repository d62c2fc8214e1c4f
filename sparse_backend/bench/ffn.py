"""`prosparse bench ffn`: one feed-forward layer, torch's dense FFN against our op.

    prosparse bench ffn --device cpu --d-model 4096 --d-ff 11008 --density 0.107 --rows 1,2,4,8,16,64 --json

The rival is what a torch user has: F.linear, F.threshold, a product, F.linear, on the usual weight layouts. Neurons are active
independently of each other. Calls go round several layers, more than the caches hold, and the variants take turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from sparse_backend.bench.arguments import row_counts
from sparse_backend.errors import UserError
from sparse_backend.ffn import counters, native, paths, sparse_gated_ffn, synthetic
from sparse_backend.ffn.counters import DENSE, ROWS, SPARSE

_MAX_BYTES = 3 * 2**30 - 2**28  # of all layers, the rival's copy of down included
_MAX_LAYERS = 64
_CALLS = 45  # per variant and row count, at least


class FfnResult(TypedDict):
    """One row count; times are medians of single calls."""

    rows: int
    density: float
    """Measured share of active neurons, mean over rows."""
    union: float
    """Measured share of neurons active for at least one row of a call."""
    dense_ms: float
    """torch's dense FFN in the same dtype."""
    sparse_ms: float
    """Our op, held to the sparse path."""
    auto_ms: float
    """Our op, choosing its path by the table measured on this machine."""
    path: Literal["sparse", "dense"]
    """What it chose."""
    speedup: float
    """dense_ms / auto_ms."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where to run (default cpu)")
    parser.add_argument("--d-model", type=int, default=4096, help="model width (default 4096)")
    parser.add_argument("--d-ff", type=int, default=11008, help="neurons of the layer (default 11008)")
    parser.add_argument("--density", type=float, default=0.107, help="share of active neurons per row (default 0.107)")
    parser.add_argument(
        "--rows",
        type=row_counts,
        default=[1, 2, 4, 8, 16, 64],
        metavar="N,N",
        help="row counts (default 1,2,4,8,16,64)",
    )
    parser.add_argument(
        "--dtype", choices=paths.DTYPES, default="bfloat16", help="dtype of weights and activations (default bfloat16)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    native.require()
    paths.check_shape(arguments.d_model, arguments.d_ff)
    if not 0 <= arguments.density <= 1:
        raise UserError(f"--density is {arguments.density}, but a share of neurons lies between 0 and 1.")
    results = measure(
        paths.DTYPES[arguments.dtype], arguments.d_model, arguments.d_ff, arguments.density, arguments.rows
    )
    if arguments.json:
        print(json.dumps(results, indent=1))
        return 0
    shape = f"{arguments.dtype}, {arguments.d_model} x {arguments.d_ff}"
    table = Table(title=f"{shape}, {native.kernel_info().isa}, {torch.get_num_threads()} threads")
    for column in ("rows", "density", "union", "torch dense ms", "sparse ms", "auto ms", "path", "speed-up"):
        table.add_column(column, justify="right")
    for row in results:
        shares = f"{row['density']:.3f}", f"{row['union']:.3f}"
        times = f"{row['dense_ms']:.3f}", f"{row['sparse_ms']:.3f}", f"{row['auto_ms']:.3f}"
        table.add_row(str(row["rows"]), *shares, *times, row["path"], f"{row['speedup']:.2f}")
    Console().print(table)
    return 0


def measure(dtype: torch.dtype, d_model: int, d_ff: int, density: float, row_list: list[int]) -> list[FfnResult]:
    """Time every row count."""
    limit = paths.max_sparse_rows(dtype, d_model, d_ff, density)
    generator = torch.Generator().manual_seed(0)
    layer_bytes = 4 * d_model * d_ff * dtype.itemsize
    wanted = max(3, -(-4 * synthetic.cache_bytes() // layer_bytes))
    count = max(1, min(wanted, _MAX_LAYERS, _MAX_BYTES // layer_bytes))
    layers = [synthetic.Layer.random(dtype, d_model, d_ff, generator) for _ in range(count)]
    for layer in layers:
        layer.set_density(density)
    downs = [layer.down_t.t().contiguous() for layer in layers]
    with torch.inference_mode():
        return [
            _measure_rows(layers, downs, synthetic.inputs(rows, dtype, d_model, generator), limit) for rows in row_list
        ]


def torch_dense_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, threshold: float) -> torch.Tensor:
    """The rival: x [rows, d_model], gate_up [2 * d_ff, d_model], down [d_model, d_ff]."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=1)
    return F.linear(F.threshold(gate, threshold, 0.0) * up, down)


def _measure_rows(layers: list[synthetic.Layer], downs: list[torch.Tensor], x: torch.Tensor, limit: int) -> FfnResult:
    counts = counters.new_counters()
    unused = counters.new_counters()

    def ours(max_sparse_rows: int, counted: torch.Tensor) -> Callable[[int], torch.Tensor]:
        return lambda index: sparse_gated_ffn(
            x, layers[index].gate_up, layers[index].down_t, synthetic.THRESHOLD, counted, max_sparse_rows
        )

    variants: dict[str, Callable[[int], torch.Tensor]] = {
        "dense": lambda index: torch_dense_ffn(x, layers[index].gate_up, downs[index], synthetic.THRESHOLD),
        "sparse": ours(paths.ALWAYS_SPARSE, unused),
        "auto": ours(limit, counts),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    rounds = -(-_CALLS // len(layers))
    position = 0
    for round_ in range(rounds + 1):
        # Every variant runs through all layers; who begins changes from round to round.
        for _ in layers:
            for name in list(variants)[:: 1 if round_ % 2 == 0 else -1]:
                index = position % len(layers)
                position += 1
                start = time.perf_counter()
                variants[name](index)
                elapsed = (time.perf_counter() - start) * 1e3
                if round_ > 0:
                    times[name].append(elapsed)
    d_ff = layers[0].down_t.shape[0]
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        "rows": x.shape[0],
        "density": round(counters.density(counts, d_ff) or 0.0, 4),
        "union": round(counters.union_density(counts, d_ff) or 0.0, 4),
        "dense_ms": round(medians["dense"], 4),
        "sparse_ms": round(medians["sparse"], 4),
        "auto_ms": round(medians["auto"], 4),
        "path": "sparse" if counts[SPARSE, ROWS] > counts[DENSE, ROWS] else "dense",
        "speedup": round(medians["dense"] / medians["auto"], 3),
    }
