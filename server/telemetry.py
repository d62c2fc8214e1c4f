"""Live sparsity for Prometheus: the workers' counters, read when somebody scrapes, as metrics named ``sparse_…``."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from sparse_backend.vllm_plugin.snapshot import PATHS, KernelRecord, LayerSnapshot, SparsitySnapshot, add_up

logger = logging.getLogger(__name__)

# Seconds over which densities are taken: Prometheus's usual scrape interval.
WINDOW = 15.0

# The engine is asked at most this often (seconds), however many scrape.
MIN_INTERVAL = 1.0

# Seconds a scrape waits for the engine before it serves the counters of last time.
TIMEOUT = 2.0


@dataclass(frozen=True)
class _Sums:
    """Counts of one layer over both paths."""

    rows: int
    active: int
    union: int
    steps: int

    @classmethod
    def of(cls, layer: LayerSnapshot) -> "_Sums":
        counts = layer["paths"].values()
        return cls(
            rows=sum(path["rows"] for path in counts),
            active=sum(path["active"] for path in counts),
            union=sum(path["union"] for path in counts),
            steps=sum(path["steps"] for path in counts),
        )

    def __sub__(self, earlier: "_Sums") -> "_Sums":
        return _Sums(
            self.rows - earlier.rows,
            self.active - earlier.active,
            self.union - earlier.union,
            self.steps - earlier.steps,
        )


class SparsityTelemetry(Collector):
    """Keeps recent snapshots of the counters and shows them as metrics.

    Densities are ratios of counter differences between the newest snapshot and the newest one that is at least
    ``WINDOW`` seconds older (or the oldest there is), so they follow the traffic. A layer that computed no row in
    between has none.
    """

    def __init__(
        self,
        checkpoint_densities: Sequence[float] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoint_densities = checkpoint_densities
        self._clock = clock
        self._ask: Callable[[], Awaitable[list[SparsitySnapshot]]] | None = None
        self._snapshots: deque[tuple[float, SparsitySnapshot]] = deque()
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._owed = False
        self._answers = 0
        self._answer_seconds = 0.0
        self._failures = 0

    @property
    def kernel(self) -> KernelRecord:
        """Which implementation computes the feed-forward layers; known once ``start`` has returned."""
        return self._snapshots[-1][1]["kernel"]

    async def start(self, ask: Callable[[], Awaitable[list[SparsitySnapshot]]]) -> None:
        """Take the first snapshot, from which densities are counted.

        Args:
            ask: returns each replica's snapshot.

        Raises:
            Exception: whatever ``ask`` raises.
        """
        self._ask = ask
        self._asked_at = self._clock()
        self._snapshots.clear()
        self._record(await ask())

    def stop(self) -> None:
        """The engine is gone: ask nothing any more, and show its last counters until the next ``start``."""
        self._ask = None
        self._owed = False
        if self._question is not None:
            self._question.cancel()

    async def refresh(self) -> None:
        """Bring the counters up to date; an engine that fails or is silent for ``TIMEOUT`` seconds leaves the last ones.

        One question is out at a time, at most one in ``MIN_INTERVAL``: a hung engine is asked once, and every caller waits
        for that answer.
        """
        if self._ask is None:
            return
        if self._question is None and self._clock() - self._asked_at >= MIN_INTERVAL:
            self._asked_at = self._clock()
            self._owed = True
            self._question = asyncio.create_task(self._fetch(self._ask))
        if self._question is not None:
            await asyncio.wait({self._question}, timeout=TIMEOUT)
        if self._owed:
            self._failures += 1

    async def _fetch(self, ask: Callable[[], Awaitable[list[SparsitySnapshot]]]) -> None:
        try:
            self._record(await ask())
        except Exception:
            # Whatever went wrong in the engine, a scrape must still be answered; the counter tells of it.
            logger.warning("the sparsity counters could not be read", exc_info=True)
        finally:
            self._question = None

    def _record(self, snapshots: list[SparsitySnapshot]) -> None:
        now = self._clock()
        self._answers += 1
        self._answer_seconds += now - self._asked_at
        self._snapshots.append((now, add_up(snapshots)))
        self._owed = False
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= now - WINDOW:
            self._snapshots.popleft()

    def collect(self) -> Iterator[Metric]:
        """All metrics, from what is known now; asks nobody. What is not known yet has no sample."""
        yield SummaryMetricFamily(
            "sparse_snapshot_seconds",
            "Time the engine took to answer with its sparsity counters.",
            count_value=self._answers,
            sum_value=self._answer_seconds,
        )
        yield CounterMetricFamily(
            "sparse_snapshot_failures", "Scrapes for which the engine gave no counters in time.", value=self._failures
        )
        yield _per_layer(
            "sparse_ffn_expected_density",
            "Share of neurons active per token row on held-out text when the checkpoint was made, from its manifest;"
            " absent without one.",
            ((str(layer), density) for layer, density in enumerate(self._checkpoint_densities or ())),
        )
        latest = self._snapshots[-1][1] if self._snapshots else None
        yield _kernel(latest["kernel"] if latest else None)
        layers = latest["layers"] if latest else []
        yield from _shapes(layers)
        yield from _counters(layers)
        yield from self._densities()

    def _densities(self) -> Iterator[Metric]:
        density: list[tuple[str, float]] = []
        union_density: list[tuple[str, float]] = []
        # If the engine has stopped answering, old densities would look like live ones.
        if self._snapshots and self._clock() - self._snapshots[-1][0] <= WINDOW:
            for before, now in zip(self._snapshots[0][1]["layers"], self._snapshots[-1][1]["layers"], strict=True):
                delta = _Sums.of(now) - _Sums.of(before)
                if delta.rows > 0:
                    density.append((now["layer"], delta.active / (delta.rows * now["d_ff"])))
                    union_density.append((now["layer"], delta.union / (delta.steps * now["d_ff"])))
        yield _per_layer(
            "sparse_ffn_density",
            "Share of neurons active per token row, over the last scrape interval; absent at rest.",
            density,
        )
        yield _per_layer(
            "sparse_ffn_union_density",
            "Share of neurons active for at least one row of a step, over the last scrape interval; absent at rest.",
            union_density,
        )


def _per_layer(name: str, documentation: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=["layer"])
    for layer, value in values:
        family.add_metric([layer], value)
    return family


def _kernel(kernel: KernelRecord | None) -> InfoMetricFamily:
    family = InfoMetricFamily(
        "sparse_kernel",
        "Implementation of the feed-forward layers: cpu, cuda, or reference where the kernels could not be built; the reason is"
        " empty unless every layer is therefore computed densely.",
        labels=[],
    )
    if kernel is not None:
        family.add_metric([], {"name": kernel["name"], "isa": kernel["isa"], "reason": kernel["reason"]})
    return family


def _shapes(layers: Sequence[LayerSnapshot]) -> Iterator[Metric]:
    yield _per_layer(
        "sparse_ffn_neurons", "Neurons (d_ff) of the layer.", ((layer["layer"], layer["d_ff"]) for layer in layers)
    )
    yield _per_layer(
        "sparse_ffn_neuron_bytes",
        "Bytes of one neuron's row in one of the layer's three matrices (gate, up, down), in the engine's dtype.",
        ((layer["layer"], layer["neuron_bytes"]) for layer in layers),
    )
    yield _per_layer(
        "sparse_ffn_max_sparse_rows",
        "Steps of at most this many token rows take the sparse path; 0: none does.",
        ((layer["layer"], layer["max_sparse_rows"]) for layer in layers),
    )
    fallbacks = GaugeMetricFamily(
        "sparse_ffn_dense_fallback",
        "1 for a layer that vLLM's own linear layers compute, densely, and why: lora, it may have an adapter; quantization, its"
        " weights are quantised.",
        labels=["layer", "reason"],
    )
    for layer in layers:
        if layer["dense_reason"]:
            fallbacks.add_metric([layer["layer"], layer["dense_reason"]], 1)
    yield fallbacks


def _counters(layers: Sequence[LayerSnapshot]) -> Iterator[Metric]:
    rows = CounterMetricFamily("sparse_ffn_rows", "Token rows computed.", labels=["layer", "path"])
    active = CounterMetricFamily(
        "sparse_ffn_active_neurons", "Active neurons, summed over rows.", labels=["layer", "path"]
    )
    union = CounterMetricFamily(
        "sparse_ffn_union_neurons",
        "Neurons active for at least one row, summed over engine steps.",
        labels=["layer", "path"],
    )
    steps = CounterMetricFamily(
        "sparse_ffn_steps", "Engine steps that computed at least one row.", labels=["layer", "path"]
    )
    for layer in layers:
        for path in PATHS:
            counts = layer["paths"][path]
            labels = [layer["layer"], path]
            rows.add_metric(labels, counts["rows"])
            active.add_metric(labels, counts["active"])
            union.add_metric(labels, counts["union"])
            steps.add_metric(labels, counts["steps"])
    return iter((rows, active, union, steps))
