"""What a server exports, from the code that exports it; no engine runs for it."""

import itertools
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric

from server.admission import Admission
from server.batching import BatchingTelemetry
from server.errors import RefusalError
from server.health import Health
from server.metrics import ServerMetrics
from server.settings import Settings
from server.telemetry import MIN_INTERVAL, SparsityTelemetry
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.vllm_plugin.snapshot import PATHS, PathCounts, SparsitySnapshot

DEMO = Path(__file__).parents[1] / "demo"

# What the name of a sample ends with, where it is not called like its family.
SUFFIXES = {
    "counter": ["_total"],
    "info": ["_info"],
    "summary": ["_sum", "_count"],
    "histogram": ["_bucket", "_sum", "_count"],
}


def series(family: Metric) -> list[str]:
    """The names that a family's samples have in Prometheus."""
    return [family.name + suffix for suffix in SUFFIXES.get(family.type, [""])]


def labels(family: Metric) -> list[str]:
    """The labels of a family that has samples; those that its type brings left out."""
    return sorted({label for sample in family.samples for label in sample.labels} - {"le", "quantile"})


async def ours() -> list[Metric]:
    """Our families (``sparse_…``), of a server that has been busy since its last scrape."""
    ticks = itertools.count(step=MIN_INTERVAL)
    telemetry = SparsityTelemetry([0.1], clock=lambda: next(ticks))
    rows = itertools.count()

    async def ask() -> list[SparsitySnapshot]:
        return [_busy(next(rows))]

    await telemetry.start(ask)
    await telemetry.refresh()
    return [*telemetry.collect(), *_servers().collect()]


def _servers() -> CollectorRegistry:
    """Of a server that has answered a request and refused one."""
    metrics = ServerMetrics(Health(stall_timeout=1), Admission(Settings.load({"model": DEMO})))
    metrics.serves("demo")
    metrics.answered("/v1/completions", 200)
    metrics.rejected(RefusalError(429, "", reason="queue_requests"))
    metrics.registry.register(_batching())
    return metrics.registry


def _batching() -> BatchingTelemetry:
    """Of a scheduler that has finished a request and once lacked something."""
    batching = BatchingTelemetry("sparse")
    batching.take(
        {
            "replica": 0,
            "decisions": {"admit": 1},
            "fallbacks": {"counters": 1},
            "errors": {"sparse": 0.1, "dense": 0.1},
            "running": [],
            "finished": [{"id": "chatcmpl-1-00000000", "density": 0.1, "rows": 1}],
        }
    )
    return batching


def vllms() -> list[Metric]:
    """vLLM's families (``vllm:…``), as they are for the demo checkpoint and our default flags."""
    # Importing it takes seconds, and ours() does without.
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from server.vllm_compat import get_prometheus_registry, parse_flags

    arguments = parse_flags(Settings.load({"model": DEMO}), Checkpoint.open(DEMO, verify=False))
    PrometheusStatLogger(AsyncEngineArgs.from_cli_args(arguments).create_engine_config())
    return [family for family in get_prometheus_registry().collect() if family.name.startswith("vllm:")]


def _busy(rows: int) -> SparsitySnapshot:
    """Of two layers, one of which has no sparse path."""
    counts: PathCounts = {"rows": rows, "active": rows, "union": rows, "steps": rows}
    reasons = ("", "quantization")
    return {
        "kernel": {"name": "cpu", "isa": "avx2", "reason": ""},
        "layers": [
            {
                "layer": str(index),
                "d_ff": 8,
                "neuron_bytes": 16,
                "max_sparse_rows": 1,
                "dense_reason": reason,
                "paths": dict.fromkeys(PATHS, counts),
            }
            for index, reason in enumerate(reasons)
        ],
    }
