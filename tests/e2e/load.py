"""Load on a running server from one process, at a given rate or by a given number of clients, and what came of it."""

import asyncio
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.e2e.streams import Outcome, Request


@dataclass
class Result:
    """What the clients saw."""

    seconds: float
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def answered(self) -> list[Outcome]:
        """Those that were let in and whose stream ended as it should."""
        return [
            outcome for outcome in self.outcomes if outcome.status == 200 and outcome.done and outcome.error is None
        ]

    @property
    def refused(self) -> list[Outcome]:
        """Those that were told to come back later."""
        return [outcome for outcome in self.outcomes if outcome.status == 429]

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.answered) / self.seconds

    def itl(self, percent: int) -> float:
        """Percentile of the seconds between two tokens of a request, over all tokens."""
        gaps = [
            later - earlier
            for outcome in self.answered
            for earlier, later in zip(outcome.tokens, outcome.tokens[1:], strict=False)
        ]
        return statistics.quantiles(gaps, n=100)[percent - 1]


class Load:
    """Streams of one kind of request."""

    def __init__(self, port: int, body: Mapping[str, object], headers: Mapping[str, str]) -> None:
        self._port = port
        self._body = {**body, "stream": True}
        self._headers = headers

    async def clients(self, count: int, seconds: float) -> Result:
        """So many clients, each of which asks again when it has its answer."""
        began = time.monotonic()
        result = Result(seconds)

        async def client() -> None:
            while time.monotonic() - began < seconds:
                result.outcomes.append(await self._ask())

        await asyncio.gather(*(client() for _ in range(count)))
        result.seconds = time.monotonic() - began
        return result

    async def rate(self, per_second: float, seconds: float) -> Result:
        """So many requests a second, whatever becomes of them."""
        began = time.monotonic()
        running = set()
        result = Result(seconds)
        for number in range(int(per_second * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            running.add(asyncio.create_task(self._ask()))
        result.outcomes = list(await asyncio.gather(*running))
        result.seconds = time.monotonic() - began
        return result

    async def _ask(self) -> Outcome:
        return await Request(self._port, self._body, self._headers, "/v1/completions").run()
