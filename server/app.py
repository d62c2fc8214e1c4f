"""The FastAPI apps: operations (probes, metrics), which always answer, and the OpenAI API, once its engine is up."""

from collections.abc import Callable, Iterable

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.types import ASGIApp

from server.auth import ApiKeyMiddleware
from server.health import METRICS_PATH, FrontDoor, Health, probe_router
from server.page import page_router
from server.telemetry import SparsityTelemetry

TITLE = "ProSparse Serve"


def metrics_router(telemetry: SparsityTelemetry, registries: Iterable[Callable[[], CollectorRegistry]]) -> APIRouter:
    """``/metrics``: ours, then those of each registry (looked up at every scrape)."""
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


def with_keys(door: FrontDoor, keys: list[str]) -> ASGIApp:
    """What uvicorn calls: the front door, behind the key check if there are keys."""
    return ApiKeyMiddleware(door, keys) if keys else door


def operations_routers(
    health: Health, telemetry: SparsityTelemetry, registries: Iterable[Callable[[], CollectorRegistry]]
) -> list[APIRouter]:
    """Probes, metrics and the live page."""
    return [probe_router(health), metrics_router(telemetry, registries), page_router()]
