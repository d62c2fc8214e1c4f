"""Up to how many rows the sparse path is faster than the dense one: measured on this machine, cached, and `prosparse paths`.

The limit depends on the density: the more neurons a row activates, the sooner the union of a few rows is everything. It is
measured for a handful of densities on random layers and kept in ``<cache>/paths/``, one file per machine and kernel build.
"""

import argparse
import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from sparse_backend.cache import cache_dir, locked
from sparse_backend.errors import UserError
from sparse_backend.ffn import counters, native, synthetic
from sparse_backend.ffn.op import sparse_gated_ffn

logger = logging.getLogger(__name__)

ALWAYS_SPARSE, ALWAYS_DENSE = 2**31 - 1, 0
"""Values of ``max_sparse_rows`` that force a path whatever the number of rows."""

DEFAULT_DENSITY = 0.107
"""Assumed where a checkpoint does not tell its densities: what ProSparse reports for its 7B model."""

DENSITIES = (0.05, 0.11, 0.2, 0.35, 0.5, 1.0)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_BUDGET_S = 9.0
_REPEATS = 5
_MARGIN = 0.03  # ties go to the dense path, whose time grows more slowly up to the next measured row count
_HOPELESS = 1.25  # a density is given up after two row counts in a row at which sparse takes so many times dense
_MAX_LAYERS = 32
_MAX_BYTES = 2**30  # of random layers, unless a single one is larger


class Timing(BaseModel):
    """Milliseconds of one call for some rows of some density, median."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    sparse_ms: float
    dense_ms: float


class PathTable(BaseModel):
    """What was measured for one dtype, shape and number of threads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limits: dict[float, int]
    """Per measured density, up to how many rows the sparse path pays."""
    timings: dict[float, list[Timing]]
    """Per measured density, what the limit was read from, by ascending row count."""

    def max_sparse_rows(self, density: float) -> int:
        """The limit for the next measured density at or above ``density``."""
        measured = sorted(self.limits)
        at_or_above = [candidate for candidate in measured if candidate >= density]
        return self.limits[at_or_above[0] if at_or_above else measured[-1]]


def best_limit(timings: list[Timing], start: int = 0) -> int:
    """The row count up to which taking the sparse path costs least over all measured row counts; ``start`` if none pays.

    Costs are compared as logarithms of time, so that a microsecond at one row weighs as much as its share of the call.
    """
    limit, best, gain = start, 0.0, 0.0
    for timing in timings:
        gain += math.log(timing.dense_ms / timing.sparse_ms) - _MARGIN
        if gain > best:
            limit, best = timing.rows, gain
    return limit


def max_sparse_rows(dtype: torch.dtype, d_model: int, d_ff: int, density: float | None) -> int:
    """Up to how many rows a layer should take the sparse path.

    Measures on first use, for up to about ten seconds; other processes wait for the result.

    Args:
        dtype: of weights and activations.
        d_model: model width.
        d_ff: neurons of the layer (of this rank's share with tensor parallelism).
        density: mean share of active neurons per row; None assumes ``DEFAULT_DENSITY``.
    """
    if not native.load():
        return ALWAYS_DENSE
    return path_table(dtype, d_model, d_ff).max_sparse_rows(DEFAULT_DENSITY if density is None else density)


def path_table(dtype: torch.dtype, d_model: int, d_ff: int, *, remeasure: bool = False) -> PathTable:
    """The table for this machine, kernel build, dtype, shape and number of threads: cached, else measured and cached."""
    key = f"{str(dtype).removeprefix('torch.')} {d_model}x{d_ff} {native.kernel_info().isa} {torch.get_num_threads()} threads"
    file = cache_dir() / "paths" / f"{native.library_key()}-{_machine_key()}.json"
    if not remeasure and (table := _read(file).get(key)):
        return table
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent / "lock"):
            tables = _read(file)
            if remeasure or key not in tables:
                tables[key] = _measure(dtype, d_model, d_ff)
                _write(file, tables)
            return tables[key]
    except OSError as error:
        logger.warning("The measured paths cannot be kept in %s: %s", file.parent, error)
        return _measure(dtype, d_model, d_ff)


def _measure(dtype: torch.dtype, d_model: int, d_ff: int) -> PathTable:
    logger.info("Measuring up to how many rows the sparse path pays, for %s, %d x %d", dtype, d_model, d_ff)
    deadline = time.perf_counter() + _BUDGET_S
    generator = torch.Generator().manual_seed(0)
    layer_bytes = 3 * d_model * d_ff * dtype.itemsize
    wanted = -(-2 * synthetic.cache_bytes() // layer_bytes)
    count = max(1, min(wanted, _MAX_LAYERS, _MAX_BYTES // layer_bytes))
    layers = [synthetic.Layer.random(dtype, d_model, d_ff, generator) for _ in range(count)]
    unused = counters.new_counters()
    calls = 0

    def timer(x: torch.Tensor, limit: int) -> Callable[[], float]:
        def call() -> float:
            nonlocal calls
            layer = layers[calls % count]
            calls += 1
            start = time.perf_counter()
            sparse_gated_ffn(x, layer.gate_up, layer.down_t, synthetic.THRESHOLD, unused, limit)
            return (time.perf_counter() - start) * 1e3

        return call

    limits: dict[float, int] = {}
    timings: dict[float, list[Timing]] = {}
    limit = 0
    with torch.inference_mode():
        # From the densest on: what pays there pays with fewer active neurons all the more, and need not be measured again.
        for index, density in enumerate(reversed(DENSITIES)):
            share = time.perf_counter() + (deadline - time.perf_counter()) / (len(DENSITIES) - index)
            for layer in layers:
                layer.set_density(density)
            timings[density] = list(_measure_density(timer, limit, dtype, d_model, generator, share))
            limits[density] = limit = best_limit(timings[density], limit)
    return PathTable(limits=limits, timings=timings)


def _measure_density(
    timer: Callable[[torch.Tensor, int], Callable[[], float]],
    known: int,
    dtype: torch.dtype,
    d_model: int,
    generator: torch.Generator,
    deadline: float,
) -> Iterator[Timing]:
    """Timings of the row counts above ``known``, up to where the sparse path has clearly lost."""
    hopeless = 0
    for rows in (rows for rows in ROWS if rows > known):
        x = synthetic.inputs(rows, dtype, d_model, generator)
        sparse, dense = timer(x, ALWAYS_SPARSE), timer(x, ALWAYS_DENSE)
        sparse(), dense()
        samples: list[tuple[float, float]] = []
        while not samples or (len(samples) < _REPEATS and time.perf_counter() < deadline):
            samples.append((sparse(), dense()))
        timing = Timing(
            rows=rows,
            sparse_ms=round(statistics.median(sample[0] for sample in samples), 4),
            dense_ms=round(statistics.median(sample[1] for sample in samples), 4),
        )
        yield timing
        hopeless = hopeless + 1 if timing.sparse_ms > _HOPELESS * timing.dense_ms else 0
        if hopeless == 2:
            return


def check_shape(d_model: int, d_ff: int) -> None:
    """Refuse a shape the op does not take.

    Raises:
        UserError: one of them is no positive multiple of 8.
    """
    for flag, size in (("--d-model", d_model), ("--d-ff", d_ff)):
        if size <= 0 or size % 8:
            raise UserError(f"{flag} is {size}, but the kernels take positive multiples of 8.")


@functools.cache
def _machine_key() -> str:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), model)
    described = f"{platform.machine()} {model} {os.cpu_count()} {torch.__version__}"
    return hashlib.sha256(described.encode()).hexdigest()[:12]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tables: dict[str, PathTable]


def _read(file: Path) -> dict[str, PathTable]:
    """What the file holds; nothing if it is missing or damaged: it can be measured again."""
    try:
        return _File.model_validate_json(file.read_bytes()).tables
    except (OSError, ValidationError):
        return {}


def _write(file: Path, tables: dict[str, PathTable]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
        temporary.write(_File(tables=tables).model_dump_json(indent=1))
    Path(temporary.name).replace(file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `prosparse paths`."""
    parser.add_argument("--d-model", type=int, required=True, help="model width, a multiple of 8")
    parser.add_argument("--d-ff", type=int, required=True, help="neurons per layer, a multiple of 8")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--remeasure", action="store_true", help="measure again even where a result is cached")


def run(arguments: argparse.Namespace) -> int:
    """Print the limits, measuring them first where needed."""
    native.require()
    check_shape(arguments.d_model, arguments.d_ff)
    table = path_table(DTYPES[arguments.dtype], arguments.d_model, arguments.d_ff, remeasure=arguments.remeasure)
    if arguments.json:
        rows = [
            {"density": density, "max_sparse_rows": limit, "timings": [t.model_dump() for t in table.timings[density]]}
            for density, limit in sorted(table.limits.items())
        ]
        print(json.dumps(rows, indent=1))
        return 0
    info = native.kernel_info()
    shown = Table(
        title=f"{arguments.dtype}, {arguments.d_model} x {arguments.d_ff}, {info.isa}, {torch.get_num_threads()} threads"
    )
    for column in ("density", "sparse up to rows"):
        shown.add_column(column, justify="right")
    for density, limit in sorted(table.limits.items()):
        shown.add_row(f"{density:g}", str(limit))
    Console().print(shown)
    return 0
