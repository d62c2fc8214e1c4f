"""For how long the engine has owed us something: a step while it has work, a sign of life while it has none."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

# Seconds without work after which an engine is asked whether it is alive.
_QUIET = 2.0


class Watchdog:
    """Steps are reported to it; an engine at rest is asked, one question at a time."""

    def __init__(
        self,
        busy: Callable[[], bool],
        ask: Callable[[], Awaitable[object]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with an engine that has just shown that it works.

        Args:
            busy: whether the engine has requests to work on.
            ask: returns once every process of the engine has answered.
            clock: seconds.
        """
        self._busy = busy
        self._ask = ask
        self._clock = clock
        self._sign = self._idle = clock()
        self._question: asyncio.Task[None] | None = None
        self._owed_since: float | None = None

    def step(self) -> None:
        """The engine took a step."""
        self._sign = self._clock()

    def stalled(self) -> float:
        """Seconds for which it has owed a step or an answer; 0 if it owes none."""
        now = self._clock()
        if self._busy():
            return now - max(self._idle, self._sign)
        self._idle = now
        return 0.0 if self._owed_since is None else now - max(self._owed_since, self._sign)

    def tick(self) -> None:
        """To be called about once a second: asks an engine that has been quiet."""
        quiet = not self._busy() and self._clock() - self._sign >= _QUIET
        self.stalled()
        if quiet and self._question is None:
            if self._owed_since is None:
                self._owed_since = self._clock()
            self._question = asyncio.create_task(self._put_question())

    def stop(self) -> None:
        """Wait for no answer any more."""
        if self._question is not None:
            self._question.cancel()

    async def _put_question(self) -> None:
        try:
            await self._ask()
            self._owed_since = None
            self._sign = self._clock()
        except Exception:
            # It stays owed, and is asked again at the next tick.
            logger.warning("the engine did not answer whether it is alive", exc_info=True)
        finally:
            self._question = None
