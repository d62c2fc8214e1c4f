"""Replays requests against a running server and notes when each token came."""

import asyncio
import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
import httpx

from sparse_backend.bench.trace import TraceRequest

_TIMEOUT_S = 600.0  # for a whole answer
_PAUSE_S = 0.2
_EVENT = b"data: {"
"""How each event begins; the last one of an answer, which says that there are no more, does not."""
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_END_BYTES = 2048  # more than the event with the usage, which is the last but one


@dataclass(frozen=True)
class Outcome:
    """What came of one request."""

    traffic_class: str
    sent_s: float
    """After the start of the replay."""
    status: int
    """Of the answer; 0 if there was none, or none to its end."""
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    """Times between tokens; those that came in one event are taken for one, since only their number is known."""
    tokens: int = 0
    """Of the answer, by its usage."""
    ended_s: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """Token ids to send, and how many to ask for."""

    request: TraceRequest
    tokens: Sequence[int]


class Router(Protocol):
    """Decides which of several servers a request goes to."""

    def begin(self, traffic_class: str) -> int:
        """Index of the server for a new request, which is counted as its own from now on."""

    def end(self, index: int, traffic_class: str) -> None:
        """A request has left a server."""


class OneServer:
    """No choice."""

    def begin(self, traffic_class: str) -> int:
        """Zero."""
        return 0

    def end(self, index: int, traffic_class: str) -> None:
        """Nothing to note."""


class Client:
    """Of one server, or of several with the same model."""

    def __init__(self, urls: Sequence[str], model: str, router: Router) -> None:
        self._urls, self._model, self._router = urls, model, router

    async def replay(self, prompts: Sequence[Prompt]) -> list[Outcome]:
        """Send each prompt at its time, whatever came of those before it."""
        async with self._connect() as http:
            start = time.perf_counter()

            async def one(prompt: Prompt) -> Outcome:
                await asyncio.sleep(start + prompt.request.at_s - time.perf_counter())
                return await self._send(http, prompt, start)

            return list(await asyncio.gather(*map(one, prompts)))

    async def saturate(self, prompts: Sequence[Prompt], at_once: int, seconds: float) -> list[Outcome]:
        """Keep ``at_once`` requests going for so long, prompts over again where they run out; those cut off are left out."""
        async with self._connect() as http:
            start = time.perf_counter()
            outcomes: list[Outcome] = []

            async def worker(first: int) -> None:
                index = first
                while True:
                    outcome = await self._send(http, prompts[index % len(prompts)], start)
                    outcomes.append(outcome)
                    if outcome.status != 200:
                        # One that is refused at once would be asked for again and again.
                        await asyncio.sleep(_PAUSE_S)
                    index += at_once

            workers = [asyncio.create_task(worker(index)) for index in range(at_once)]
            await asyncio.wait(workers, timeout=seconds)
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            return outcomes

    def _connect(self) -> aiohttp.ClientSession:
        # Not httpx, with which reading four thousand tokens a second keeps a core busy, and the client is what is measured.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
        )

    async def _send(self, http: aiohttp.ClientSession, prompt: Prompt, start: float) -> Outcome:
        request = prompt.request
        body = {
            "model": self._model,
            "prompt": list(prompt.tokens),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent = time.perf_counter()
        status, times, end = 0, [], b""
        server = self._router.begin(request.traffic_class)
        try:
            async with http.post(f"{self._urls[server]}/v1/completions", json=body) as response:
                status = response.status
                async for data in response.content.iter_any():
                    # An event may come in two pieces.
                    text = end + data
                    times.extend([time.perf_counter()] * (text.count(_EVENT) - end.count(_EVENT)))
                    end = text[-_END_BYTES:]
        except (aiohttp.ClientError, TimeoutError):
            status = 0
        finally:
            self._router.end(server, request.traffic_class)
        ended = time.perf_counter()
        usage = _USAGE.search(end)
        if status != 200 or usage is None:
            status = 0 if status == 200 else status
            return Outcome(request.traffic_class, sent - start, status, ended_s=ended - start)
        # The usage has an event of its own.
        gaps = [later - earlier for earlier, later in itertools.pairwise(times[:-1])]
        return Outcome(request.traffic_class, sent - start, status, times[0] - sent, gaps, int(usage[1]), ended - start)


def metrics(url: str) -> str:
    """The server's metrics page."""
    return httpx.get(f"{url}/metrics", timeout=30).text
