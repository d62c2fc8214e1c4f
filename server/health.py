"""Is the process alive, is it ready, may a request come in: probes, and the front door that every request passes."""

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response
from server.page import PAGE_PATHS

PROBE_PATHS = ("/livez", "/readyz", "/health")
METRICS_PATH = "/metrics"

# Seconds after which an engine that owes an answer counts as hung: longer than a step of a healthy engine should take.
UNANSWERED_LIMIT = 10.0

# Seconds a client is told to wait before it tries again.
RETRY_AFTER = 5


class Phase(StrEnum):
    """The life of the server process, in order."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Engine(Protocol):
    """What health needs to know of the running engine."""

    @property
    def died(self) -> bool:
        """True once the engine cannot answer any more."""


class Health:
    """The one place that knows whether requests are served, and how many are running."""

    def __init__(self, unanswered: Callable[[], Awaitable[float]]) -> None:
        """Start in phase STARTING.

        Args:
            unanswered: asks the engine for a sign of life and returns for how many seconds it now owes one.
        """
        self.phase = Phase.STARTING
        self.step = "starting"
        """What a server that is not ready yet is doing, for people."""
        self._unanswered = unanswered
        self._engine: Engine | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self, engine: Engine) -> None:
        """The engine is up: let requests in."""
        self._engine = engine
        self.phase = Phase.READY

    def drain(self) -> None:
        """Let no new request in."""
        self.phase = Phase.DRAINING

    @property
    def running(self) -> int:
        """Requests being answered."""
        return self._running

    async def idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    def refusal(self) -> str | None:
        """Why a request cannot be served now; None if it can."""
        match self.phase:
            case Phase.STARTING:
                return f"The server is not ready yet: {self.step}."
            case Phase.DRAINING:
                return "The server is shutting down."
            case Phase.READY:
                return "The engine stopped working." if self._engine is None or self._engine.died else None

    async def not_ready(self) -> str | None:
        """As ``refusal``, and also asks whether the engine still answers."""
        if (reason := self.refusal()) is not None:
            return reason
        if (seconds := await self._unanswered()) > UNANSWERED_LIMIT:
            return f"The engine has not answered for {seconds:.0f} s."
        # It may have died while we asked.
        return self.refusal()

    def begin_request(self) -> None:
        """Count a request in."""
        self._running += 1
        self._idle.clear()

    def end_request(self) -> None:
        """Count it out."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()


def probe_router(health: Health) -> APIRouter:
    """``/livez``, ``/readyz`` and ``/health``, the name under which vLLM has readiness."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez", summary="200 while the process lives")
    async def livez() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @router.get("/readyz", summary="200 while requests are served, else 503 with the reason", responses={503: {}})
    @router.get("/health", summary="The same as /readyz", responses={503: {}})
    async def readyz() -> JSONResponse:
        reason = await health.not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse(
            {"status": "not ready", "reason": reason}, status_code=503, headers={"Retry-After": str(RETRY_AFTER)}
        )

    return router


class FrontDoor:
    """Hands each request to the operations app (probes, metrics: always) or to the API app (only while ready)."""

    def __init__(self, health: Health, operations: ASGIApp) -> None:
        self._health = health
        self._operations = operations
        self._operations_paths = {path.encode() for path in (*PROBE_PATHS, METRICS_PATH, *PAGE_PATHS)}
        self.api: ASGIApp | None = None
        """Set before ``health.ready()``; the app is built once the engine it serves is up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["raw_path"] in self._operations_paths:
            await self._operations(scope, receive, send)
            return
        reason = self._health.refusal()
        if reason is not None or self.api is None:
            refusal = error_response(
                503, reason or "The server is not ready yet.", headers={"Retry-After": str(RETRY_AFTER)}
            )
            await refusal(scope, receive, send)
            return
        self._health.begin_request()
        try:
            await self.api(scope, receive, send)
        finally:
            self._health.end_request()
