"""How a request comes in: the chain of ASGI apps, from the socket to vLLM's routes."""

from collections.abc import Callable, Iterable

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server.admission import Admission
from server.auth import KeyCheck, KeyRing
from server.batching import BatchingTelemetry
from server.errors import InternalErrors
from server.health import FrontDoor, Health, probe_router
from server.intake import Intake
from server.metrics import ServerMetrics
from server.page import page_router
from server.paths import METRICS_PATH
from server.policy import RequestPolicy
from server.rates import KeyRates
from server.request_log import RequestLog
from server.settings import Settings
from server.telemetry import SparsityTelemetry

TITLE = "ProSparse Serve"


def outer_chain(
    door: FrontDoor,
    settings: Settings,
    keys: KeyRing,
    metrics: ServerMetrics,
    batching: BatchingTelemetry,
    log: Callable[[str], None],
) -> ASGIApp:
    """What uvicorn calls: CORS → id, log line, count → keys → the front door (probes, metrics, the API while ready)."""
    app: ASGIApp = KeyCheck(door, keys, settings.metrics_access)
    write = log if settings.request_log == "on" else None
    app = RequestLog(app, metrics, batching.density, write, prompts=settings.log_prompts)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def inner_chain(
    api: FastAPI,
    settings: Settings,
    policy: RequestPolicy,
    rates: KeyRates,
    admission: Admission,
    metrics: ServerMetrics,
) -> ASGIApp:
    """What stands behind the front door: rate, queue, body, policy, turn, time → fixed texts of failures → vLLM's routes."""
    return Intake(InternalErrors(api), settings, policy, rates, admission, metrics)


def operations_routers(
    health: Health, telemetry: SparsityTelemetry, registries: Iterable[Callable[[], CollectorRegistry]]
) -> list[APIRouter]:
    """Probes, metrics and the live page."""
    return [probe_router(health), metrics_router(telemetry, registries), page_router()]


def metrics_router(telemetry: SparsityTelemetry, registries: Iterable[Callable[[], CollectorRegistry]]) -> APIRouter:
    """``/metrics``: the sparsity's, then those of each registry (looked up at every scrape)."""
    own = CollectorRegistry()
    own.register(telemetry)
    router = APIRouter(tags=["operations"])

    @router.get(METRICS_PATH, summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        await telemetry.refresh()
        texts = [generate_latest(registry) for registry in (own, *(lookup() for lookup in registries))]
        return Response(b"".join(texts), media_type=CONTENT_TYPE_LATEST)

    return router


def operations_app(routers: Iterable[APIRouter]) -> FastAPI:
    """Probes, metrics and the live page, which answer in every phase."""
    app = FastAPI(title=TITLE, openapi_url=None, redirect_slashes=False)
    for router in routers:
        app.include_router(router)
    return app


def api_app(operations: Iterable[APIRouter]) -> FastAPI:
    """The app that vLLM's routes are attached to; the operations routes are in it for the documentation's sake."""
    # vLLM brings a documentation page whose scripts are served from here, not from a content network.
    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in operations:
        app.include_router(router)
    return app
