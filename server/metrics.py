"""Metrics of the server itself: requests, admission, the engine's health. Named ``sparse_…`` as the sparsity's are."""

from collections.abc import Callable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, disable_created_metrics

from server.admission import Admission
from server.errors import RefusalError
from server.health import Health

# Else every counter, vLLM's too, has a second series that says when it was made.
disable_created_metrics()


class ServerMetrics:
    """Counts, in a registry of their own."""

    def __init__(self, health: Health, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self._server = Info(
            "sparse_server", "The served model, by the name clients give, and our version.", registry=self.registry
        )
        self._requests = Counter(
            "sparse_http_requests",
            "Requests answered, by path (paths that are not served: other) and status (499: the client went away).",
            ["path", "status"],
            registry=self.registry,
        )
        self._rejected = Counter(
            "sparse_requests_rejected",
            "Requests refused for the server's load or their size, by reason: a limit of the queue (queue_requests,"
            " queue_tokens), a key's rate (key_rate), the request's own contents (policy), its size (body_bytes), its time"
            " (timeout), or a server that is not ready (not_ready).",
            ["reason"],
            registry=self.registry,
        )
        self._restarts = Counter(
            "sparse_engine_restarts",
            "Engines started in place of one that ended, by what happened to that: died or hung.",
            ["reason"],
            registry=self.registry,
        )
        for reason in ("died", "hung"):
            self._restarts.labels(reason)
        self._gauge(
            "sparse_ready", "1 while requests are served, as /readyz says, else 0.", lambda: health.refusal() is None
        )
        self._gauge(
            "sparse_engine_seconds_without_progress",
            "Seconds for which the engine has owed a step or a sign of life; 0 while it owes none.",
            lambda: health.stalled_seconds,
        )
        self._gauge("sparse_requests_admitted", "Requests that are being answered.", lambda: admission.running_requests)
        self._gauge("sparse_requests_queued", "Requests that wait for admission.", lambda: admission.queued_requests)
        self._gauge(
            "sparse_queued_tokens",
            "Tokens that the waiting requests may take, of prompts and answers.",
            lambda: admission.queued_tokens,
        )
        self._gauge(
            "sparse_queue_limit_requests",
            "Requests that may wait (queue_requests).",
            lambda: admission.limits.queue_requests,
        )
        self._gauge(
            "sparse_queue_limit_tokens",
            "Tokens that may wait (queue_tokens).",
            lambda: admission.limits.queue_tokens,
        )

    def serves(self, model: str) -> None:
        """Say which model it is."""
        self._server.info({"model": model, "version": version("prosparse-serve")})

    def answered(self, path: str, status: int) -> None:
        """Count a request that came to its end; ``path`` as ``paths.label`` says it."""
        self._requests.labels(path, str(status)).inc()

    def rejected(self, refusal: RefusalError) -> None:
        """Count a request that was refused."""
        self._rejected.labels(refusal.reason).inc()

    def restarted(self, reason: str) -> None:
        """Count an engine that was started in place of another."""
        self._restarts.labels(reason).inc()

    def _gauge(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        Gauge(name, documentation, registry=self.registry).set_function(value)
