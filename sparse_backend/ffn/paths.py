"""Up to how many rows the sparse path is faster than the dense one: measured on this machine and cached.

The limit depends on the density: the more neurons a row activates, the sooner the union of a few rows is everything. It is
measured for a handful of densities on random layers and kept in ``<cache>/paths/``, one file per machine (a CPU or a GPU
model) and kernel build.
"""

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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparse_backend.cache import cache_dir, locked
from sparse_backend.ffn import counters, native, synthetic, timing
from sparse_backend.ffn.op import sparse_gated_ffn

logger = logging.getLogger(__name__)

ALWAYS_SPARSE, ALWAYS_DENSE = 2**31 - 1, 0
"""Values of ``max_sparse_rows`` that force a path whatever the number of rows, as far as there are kernels for it."""

DEFAULT_DENSITY = 0.107
"""Assumed where a checkpoint does not tell its densities: what ProSparse reports for its 7B model."""

DENSITIES = (0.02, 0.05, 0.11, 0.2, 0.35, 0.5, 1.0)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

_MARGIN = 0.03  # ties go to the dense path, whose time grows more slowly up to the next measured row count
_HOPELESS = 1.25  # a density is given up after two row counts in a row at which sparse takes so many times dense
_MAX_BYTES = 2**30  # of random layers on a CPU, unless a single one is larger
_MAX_LAYERS = 32
_CPU_BUDGET_S = 9.0
_CPU_REPEATS = 5
_CUDA_BUDGET_S = 9.0
_CUDA_CELL_S = 0.05  # per density and row count
_CUDA_REPLAYS = (5, 15)
_CUDA_CALLS = 16  # in one graph, at least: the start of a graph must not count


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call for some rows of some density, median."""

    rows: int
    sparse_us: float
    dense_us: float


@dataclass(frozen=True)
class PathTable:
    """What was measured for one dtype, shape and, on a CPU, number of threads."""

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
    for timing_ in timings:
        gain += math.log(timing_.dense_us / timing_.sparse_us) - _MARGIN
        if gain > best:
            limit, best = timing_.rows, gain
    return limit


def max_sparse_rows(
    dtype: torch.dtype, d_model: int, d_ff: int, density: float | None, device_type: str = "cpu"
) -> int:
    """Up to how many rows a layer should take the sparse path.

    Measures on first use, for up to about ten seconds; other processes wait for the result.

    Args:
        dtype: of weights and activations.
        d_model: model width.
        d_ff: neurons of the layer (of this rank's share with tensor parallelism).
        density: mean share of active neurons per row; None assumes ``DEFAULT_DENSITY``.
        device_type: "cpu", or "cuda" for the current GPU.
    """
    if largest_sparse_rows(dtype, d_model, device_type) == 0:
        return ALWAYS_DENSE
    table = path_table(dtype, d_model, d_ff, device_type)
    return table.max_sparse_rows(DEFAULT_DENSITY if density is None else density)


def largest_sparse_rows(dtype: torch.dtype, d_model: int, device_type: str) -> int:
    """The most rows the sparse kernels take; 0 where there are none for this device or dtype."""
    if not native.load(device_type):
        return 0
    return ALWAYS_SPARSE if device_type == "cpu" else native.max_rows(dtype, d_model)


def path_table(
    dtype: torch.dtype, d_model: int, d_ff: int, device_type: str = "cpu", *, remeasure: bool = False
) -> PathTable:
    """The table for this machine, kernel build, dtype, shape and number of threads: cached, else measured and cached.

    Needs the native kernels for the device.
    """
    key = f"{str(dtype).removeprefix('torch.')} {d_model}x{d_ff} {native.kernel_info(device_type).isa}"
    if device_type == "cpu":
        key += f" {torch.get_num_threads()} threads"
    file = cache_dir() / "paths" / f"{native.library_key(device_type)}-{_machine_key(device_type)}.json"
    if not remeasure and (table := _read(file).get(key)):
        return table
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent / "lock"):
            tables = _read(file)
            if remeasure or key not in tables:
                tables[key] = _measure(dtype, d_model, d_ff, device_type)
                _write(file, tables)
            return tables[key]
    except OSError as error:
        logger.warning("The measured paths cannot be kept in %s: %s", file.parent, error)
        return _measure(dtype, d_model, d_ff, device_type)


Meter = Callable[[torch.Tensor, float], Timing]
"""Times both paths on rows [rows, d_model], stopping early after a ``time.perf_counter`` moment."""


def _measure(dtype: torch.dtype, d_model: int, d_ff: int, device_type: str) -> PathTable:
    logger.info("Measuring up to how many rows the sparse path pays, for %s, %d x %d", dtype, d_model, d_ff)
    on_cuda = device_type == "cuda"
    deadline = time.perf_counter() + (_CUDA_BUDGET_S if on_cuda else _CPU_BUDGET_S)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)
    layers = _layers(dtype, d_model, d_ff, generator)
    meter = (_cuda_meter if on_cuda else _cpu_meter)(layers)
    most_rows = largest_sparse_rows(dtype, d_model, device_type)

    limits: dict[float, int] = {}
    timings: dict[float, list[Timing]] = {}
    limit = 0
    with torch.inference_mode():
        # From the densest on: what pays there pays with fewer active neurons all the more, and need not be measured again.
        for index, density in enumerate(reversed(DENSITIES)):
            share = time.perf_counter() + (deadline - time.perf_counter()) / (len(DENSITIES) - index)
            for layer in layers:
                layer.set_density(density)
            inputs = (synthetic.inputs(rows, dtype, d_model, generator) for rows in ROWS if limit < rows <= most_rows)
            timings[density] = list(_until_hopeless(meter(x, share) for x in inputs))
            limits[density] = limit = best_limit(timings[density], limit)
    if on_cuda:
        # The memory belongs to the model that is about to be loaded.
        del layers, meter
        torch.cuda.empty_cache()
    return PathTable(limits=limits, timings=timings)


def _layers(dtype: torch.dtype, d_model: int, d_ff: int, generator: torch.Generator) -> list[synthetic.Layer]:
    """Enough random layers that no cache still holds one's weights when it is its turn again."""
    layer_bytes = 3 * d_model * d_ff * dtype.itemsize
    cache = synthetic.cache_bytes(generator.device)
    if generator.device.type == "cuda":
        # Of a layer the sparse path may read little more than the gate, a third.
        wanted = -(-8 * cache // (layer_bytes // 3))
        most_bytes = torch.cuda.mem_get_info(generator.device)[0] // 2
    else:
        wanted, most_bytes = -(-2 * cache // layer_bytes), _MAX_BYTES
    count = max(1, min(wanted, _MAX_LAYERS, most_bytes // layer_bytes))
    return [synthetic.Layer.random(dtype, d_model, d_ff, generator) for _ in range(count)]


def _call(layer: synthetic.Layer, x: torch.Tensor, limit: int, counted: torch.Tensor) -> torch.Tensor:
    return sparse_gated_ffn(x, layer.gate_up, layer.down_t, synthetic.THRESHOLD, counted, limit)


def _cpu_meter(layers: list[synthetic.Layer]) -> Meter:
    unused = counters.new_counters()
    calls = 0

    def timed(x: torch.Tensor, limit: int) -> float:
        nonlocal calls
        layer = layers[calls % len(layers)]
        calls += 1
        start = time.perf_counter()
        _call(layer, x, limit, unused)
        return (time.perf_counter() - start) * 1e6

    def meter(x: torch.Tensor, deadline: float) -> Timing:
        timed(x, ALWAYS_SPARSE), timed(x, ALWAYS_DENSE)
        samples: list[tuple[float, float]] = []
        while not samples or (len(samples) < _CPU_REPEATS and time.perf_counter() < deadline):
            samples.append((timed(x, ALWAYS_SPARSE), timed(x, ALWAYS_DENSE)))
        sparse, dense = (statistics.median(column) for column in zip(*samples, strict=True))
        return Timing(x.shape[0], round(sparse, 1), round(dense, 1))

    return meter


def _cuda_meter(layers: list[synthetic.Layer]) -> Meter:
    unused = counters.new_counters(layers[0].gate_up.device)
    in_turn = layers * -(-_CUDA_CALLS // len(layers))

    def meter(x: torch.Tensor, deadline: float) -> Timing:
        def graph(limit: int) -> torch.cuda.CUDAGraph:
            return timing.record([functools.partial(_call, layer, x, limit, unused) for layer in in_turn]).graph

        medians = timing.medians_us(
            {"sparse": graph(ALWAYS_SPARSE), "dense": graph(ALWAYS_DENSE)},
            seconds=min(_CUDA_CELL_S, deadline - time.perf_counter()),
            replays=_CUDA_REPLAYS,
        )
        sparse, dense = (round(medians[name] / len(in_turn), 2) for name in ("sparse", "dense"))
        return Timing(x.shape[0], sparse, dense)

    return meter


def _until_hopeless(timings: Iterator[Timing]) -> Iterator[Timing]:
    """What is measured up to where the sparse path has clearly lost."""
    hopeless = 0
    for timing_ in timings:
        yield timing_
        hopeless = hopeless + 1 if timing_.sparse_us > _HOPELESS * timing_.dense_us else 0
        if hopeless == 2:
            return


@functools.cache
def processor_name(device_type: str) -> str:
    """What the CPU's or the current GPU's maker calls it."""
    if device_type == "cuda":
        return str(torch.cuda.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == "model name"), platform.processor())


def _machine_key(device_type: str) -> str:
    described = f"{platform.machine()} {processor_name(device_type)} {torch.__version__}"
    if device_type == "cpu":
        described += f" {os.cpu_count()}"
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _read(file: Path) -> dict[str, PathTable]:
    """What the file holds; nothing if it is missing or damaged: it can be measured again."""
    try:
        tables = json.loads(file.read_bytes())["tables"]
        return {
            key: PathTable(
                limits={float(density): int(limit) for density, limit in table["limits"].items()},
                timings={
                    float(density): [Timing(**timing_) for timing_ in timings]
                    for density, timings in table["timings"].items()
                },
            )
            for key, table in tables.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(file: Path, tables: dict[str, PathTable]) -> None:
    content = {"tables": {key: asdict(table) for key, table in tables.items()}}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
        json.dump(content, temporary, indent=1)
    Path(temporary.name).replace(file)
