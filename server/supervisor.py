"""Keeps an engine running: starts it, watches it, starts it anew when it died or hung, gives up when that does not help."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from server.health import Health
from server.limits import Recovery
from server.metrics import ServerMetrics
from server.progress import say
from sparse_backend.errors import UserError

if TYPE_CHECKING:
    from server.vllm_compat import Engine

Failure = Literal["died", "hung"]

# Seconds between looks at the engine.
_TICK = 0.5

# Seconds an engine must have served for earlier failures to be forgotten.
_GOOD_RUN = 600.0

_LONGEST_BACKOFF = 30.0

# Seconds that an engine which has come up gets to warm up and answer its first questions.
_OPEN_LIMIT = 300.0

# Seconds that requests of an engine that was killed get to end with an error.
_LAST_WORDS = 5.0


class Supervisor:
    """One engine at a time."""

    def __init__(
        self,
        recovery: Recovery,
        health: Health,
        metrics: ServerMetrics,
        stop: asyncio.Event,
        start: Callable[[], "Awaitable[Engine | None]"],
        opened: Callable[["Engine"], Awaitable[None]],
        closed: Callable[[], None],
    ) -> None:
        """Hold what an engine's life needs.

        Args:
            recovery: when an engine counts as hung, and how often it is started anew.
            health: is told when requests may come in.
            metrics: counts the restarts.
            stop: set when the server is to end.
            start: starts an engine; returns None if ``stop`` was set meanwhile.
            opened: puts the API on a running engine.
            closed: undoes that once the engine is gone.
        """
        self._recovery = recovery
        self._health = health
        self._metrics = metrics
        self._stop = stop
        self._start = start
        self._opened = opened
        self._closed = closed
        self._failures = 0

    async def run(self) -> "Engine | None":
        """Return when ``stop`` is set: the engine that runs then, still with its requests, or None.

        Raises:
            UserError: vLLM refuses the configuration.
            EngineFailedError: the engine did not start, or failed once more than ``max_restarts``.
        """
        while not self._stop.is_set():
            engine = await self._try_to_start()
            if engine is not None:
                failure = await self._watch(engine)
                if failure is None:
                    return engine
                await self._bury(engine, failure)
            elif self._stop.is_set():
                return None
            else:
                failure = "died"
            await self._back_off(failure)
        return None

    async def _try_to_start(self) -> "Engine | None":
        try:
            engine = await self._start()
            if engine is not None:
                await self._open(engine)
            return engine
        except UserError:
            raise
        except Exception as error:
            # vLLM reports the cause where it happens, in a process of its own, and raises something general here.
            text = f"the engine did not start: {' '.join(str(error).split())} Its own messages are above."
            if self._failures == 0:
                raise EngineFailedError(text) from error
            say(text)
            return None

    async def _open(self, engine: "Engine") -> None:
        try:
            async with asyncio.timeout(_OPEN_LIMIT):
                await self._opened(engine)
        except Exception as error:
            engine.kill()
            await engine.stop()
            if isinstance(error, TimeoutError):
                raise EngineFailedError("it came up but does not answer.") from None
            raise

    async def _watch(self, engine: "Engine") -> Failure | None:
        """What became of the engine; None if the server is to end."""
        began = time.monotonic()
        while not self._stop.is_set():
            engine.tick()
            if engine.died:
                return "died"
            if engine.stalled() > self._recovery.restart_timeout:
                return "hung"
            if time.monotonic() - began > _GOOD_RUN:
                self._failures = 0
            await self._sleep(_TICK)
        return None

    async def _bury(self, engine: "Engine", failure: Failure) -> None:
        say(f"the engine {failure}; its requests end with an error")
        self._health.restarting()
        self._closed()
        engine.kill()
        try:
            await asyncio.wait_for(self._health.idle(), _LAST_WORDS)
        except TimeoutError:
            say(f"{self._health.running} requests of the engine did not end by themselves")
        await engine.stop()

    async def _back_off(self, failure: Failure) -> None:
        self._failures += 1
        if self._failures > self._recovery.max_restarts:
            raise EngineFailedError(f"the engine failed {self._failures} times; giving up")
        seconds = min(2.0 ** (self._failures - 1), _LONGEST_BACKOFF)
        say(f"starting a new engine in {seconds:g} s ({self._failures} of at most {self._recovery.max_restarts} times)")
        await self._sleep(seconds)
        if not self._stop.is_set():
            self._metrics.restarted(failure)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return


class EngineFailedError(Exception):
    """No engine runs and none will; the text says why."""
