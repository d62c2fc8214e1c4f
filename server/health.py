"""Is the process alive, is it ready, may a request come in: probes, and the front door that every request passes."""

import asyncio
from enum import StrEnum
from typing import Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import RETRY_AFTER, RefusalError
from server.page import PAGE_PATHS
from server.paths import METRICS_PATH, PROBE_PATHS


class Phase(StrEnum):
    """What the server process is at. READY and RESTARTING may follow each other; DRAINING is the last."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"


class Engine(Protocol):
    """What health needs to know of the running engine."""

    @property
    def died(self) -> bool:
        """True once the engine cannot answer any more."""

    def stalled(self) -> float:
        """Seconds for which it has owed a step or an answer."""


class Health:
    """The one place that knows whether requests are served, and how many are running."""

    def __init__(self, stall_timeout: float) -> None:
        """Start in phase STARTING.

        Args:
            stall_timeout: seconds that an engine may owe a step or an answer while it counts as ready.
        """
        self.phase = Phase.STARTING
        self.step = "starting"
        """What a server that is not ready yet is doing, for people."""
        self._stall_timeout = stall_timeout
        self._engine: Engine | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self, engine: Engine) -> None:
        """The engine is up: let requests in."""
        self._engine = engine
        self.phase = Phase.READY

    def restarting(self) -> None:
        """The engine is gone: let no request in until ``ready``."""
        self._engine = None
        self.phase = Phase.RESTARTING

    def drain(self) -> None:
        """Let no new request in."""
        self.phase = Phase.DRAINING

    @property
    def running(self) -> int:
        """Requests being answered."""
        return self._running

    @property
    def stalled_seconds(self) -> float:
        """Seconds for which the engine has owed a step or an answer; 0 without an engine."""
        return 0.0 if self._engine is None else self._engine.stalled()

    async def idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    def refusal(self) -> str | None:
        """Why a request cannot be served now; None if it can."""
        match self.phase:
            case Phase.STARTING:
                return f"The server is not ready yet: {self.step}."
            case Phase.RESTARTING:
                return "The engine stopped working; it is being started anew."
            case Phase.DRAINING:
                return "The server is shutting down."
            case Phase.READY:
                if self._engine is None or self._engine.died:
                    return "The engine stopped working."
                seconds = self.stalled_seconds
                return (
                    f"The engine has made no progress for {seconds:.0f} s." if seconds > self._stall_timeout else None
                )

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
        reason = health.refusal()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse(
            {"status": "not ready", "reason": reason}, status_code=503, headers={"Retry-After": str(RETRY_AFTER)}
        )

    return router


def not_ready(reason: str) -> RefusalError:
    """What a request is told that cannot be served now."""
    return RefusalError(503, reason, reason="not_ready", retry_after=RETRY_AFTER)


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
            await not_ready(reason or "The server is not ready yet.").response()(scope, receive, send)
            return
        self._health.begin_request()
        try:
            await self.api(scope, receive, send)
        finally:
            self._health.end_request()
