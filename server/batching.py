"""What the scheduler reports of its work, as metrics: the cost model's error, its decisions, the requests' densities."""

import asyncio
import contextlib
import json
import pathlib
import re
import socket
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from server.settings import Settings
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.batching import BatchingSettings, FinishedRequest, Report
from sparse_backend.vllm_plugin.snapshot import Path

_DENSITY_BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_SOCKET = "batching"
_REMEMBERED = 1024  # finished requests
# How vLLM names the parts of a request: which of n answers, what kind, our id, which prompt of a completion, a random suffix.
_ENGINE_ID = re.compile(r"(\d+_)?(chatcmpl-(?P<chat>.+)|cmpl-(?P<completion>.+)-\d+)-[0-9a-f]{8}")
_LARGEST_REPORT = 1 << 20


def batching_settings(settings: Settings, folder: pathlib.Path) -> BatchingSettings:
    """The scheduler's part of the settings; it reports to a socket in ``folder``.

    Raises:
        UserError: the step log cannot be written.
    """
    if settings.step_log is not None:
        try:
            settings.step_log.open("a").close()
        except OSError as error:
            raise UserError(
                f"--step-log {settings.step_log}: {error.strerror}. Name a file that can be written."
            ) from None
    return BatchingSettings.model_validate(
        {
            "policy": settings.batching,
            "itl_slo_ms": settings.itl_slo_ms,
            "ttft_slo_ms": settings.ttft_slo_ms,
            "max_unfairness_ms": settings.max_unfairness_ms,
            "report_to": str(folder / _SOCKET),
            "step_log": None if settings.step_log is None else str(settings.step_log.absolute()),
        }
    )


@dataclass(frozen=True)
class _Rows:
    """All rows of a request."""

    active: float = 0.0
    """Sum of their densities."""
    rows: int = 0


class BatchingTelemetry(Collector):
    """Takes the schedulers' reports in, one scheduler for each replica, and shows them as metrics."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._latest: dict[int, Report] = {}
        self._buckets: Counter[float] = Counter()
        self._density_sum = 0.0
        self._finished: OrderedDict[str, _Rows] = OrderedDict()
        self._socket: socket.socket | None = None

    def listen(self, folder: pathlib.Path) -> None:
        """Listen on the socket that the settings name, in the running event loop."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(folder / _SOCKET))
        asyncio.get_running_loop().add_reader(self._socket, self._receive, self._socket)

    def close(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _receive(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.take(json.loads(listener.recv(_LARGEST_REPORT)))

    def take(self, report: Report) -> None:
        """Take one in."""
        self._latest[report["replica"]] = report
        for request in report["finished"]:
            bucket = next((limit for limit in _DENSITY_BUCKETS if request["density"] <= limit), _DENSITY_BUCKETS[-1])
            self._buckets[bucket] += 1
            self._density_sum += request["density"]
            self._remember(request)

    def _remember(self, request: FinishedRequest) -> None:
        if (match := _ENGINE_ID.fullmatch(request["id"])) is None:
            return
        identity = match["chat"] or match["completion"]
        found = self._finished.pop(identity, _Rows())
        self._finished[identity] = _Rows(
            found.active + request["density"] * request["rows"], found.rows + request["rows"]
        )
        if len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)

    def density(self, request_id: str) -> float | None:
        """Of a request that finished a moment ago, by the id of its answer; the mean over its rows if it had several prompts."""
        found = self._finished.get(request_id)
        return None if found is None else found.active / found.rows

    def collect(self) -> Iterator[Metric]:
        """All metrics, from what is known now."""
        yield InfoMetricFamily("sparse_batching", "How steps are put together.", value={"policy": self._policy})
        density = HistogramMetricFamily(
            "sparse_request_density",
            "Share of active neurons of a finished request, mean over its rows and layers (ratio).",
        )
        total, buckets = 0, []
        for limit in _DENSITY_BUCKETS:
            total += self._buckets[limit]
            buckets.append((str(limit), float(total)))
        density.add_metric([], [*buckets, ("+Inf", float(total))], self._density_sum)
        yield density
        yield self._errors()
        yield self._count(
            "sparse_scheduler_decisions",
            "What the scheduler decided, per step, or per request for admit.",
            "decision",
            "decisions",
        )
        yield self._count(
            "sparse_scheduler_fallbacks",
            "Steps after which the scheduler went back to first come, first served, since something was missing.",
            "reason",
            "fallbacks",
        )

    def _errors(self) -> Metric:
        family = GaugeMetricFamily(
            "sparse_cost_error_ratio",
            "Median relative error of the predicted step times over the latest steps of a path; the worst replica's (ratio).",
            labels=["path"],
        )
        worst: dict[Path, float] = {}
        for report in self._latest.values():
            for path, error in report["errors"].items():
                worst[path] = max(error, worst.get(path, 0.0))
        for path, error in worst.items():
            family.add_metric([path], error)
        return family

    def _count(self, name: str, documentation: str, label: str, field: str) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=[label])
        sums: Counter[str] = Counter()
        for report in self._latest.values():
            sums.update(report[field])  # type: ignore[literal-required]
        for value, count in sums.items():
            family.add_metric([value], count)
        return family
