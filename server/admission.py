"""The bounded queue before the engine: who is answered now, who waits, who is told to come back later."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.errors import RETRY_AFTER, RefusalError
from server.limits import AdmissionLimits
from server.policy import Work

Key = str | None

QUEUE_FULL = "The server has as much waiting work as it takes. Try again later."

# Seconds over which the drain rate is measured, and the longest a client is told to wait.
_WINDOW = 30.0
_LONGEST_WAIT = 120.0


class DrainRate:
    """How many requests come to an end in a second, lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()

    def count(self) -> None:
        """One request came to its end."""
        now = self._clock()
        self._ends.append(now)
        # Here too: a server that is never asked would keep them all.
        self._forget_before(now - _WINDOW)

    def seconds_for(self, requests: int) -> float:
        """How long so many requests will take, from 1 to ``_LONGEST_WAIT``; ``RETRY_AFTER`` if none ended lately."""
        now = self._clock()
        self._forget_before(now - _WINDOW)
        if not self._ends:
            return RETRY_AFTER
        elapsed = max(now - self._ends[0], 1.0)
        return min(max(1.0, math.ceil(requests * elapsed / len(self._ends))), _LONGEST_WAIT)

    def _forget_before(self, moment: float) -> None:
        while self._ends and self._ends[0] < moment:
            self._ends.popleft()


@dataclass(eq=False)
class _Waiting:
    key: Key
    work: Work
    start: float
    """Virtual time, in tokens, at which a fair server would begin it."""
    turn: asyncio.Future[None] = field(default_factory=asyncio.Future)


class Admission:
    """Start-time fair queueing between keys: while two have requests waiting, each is given as many tokens as the other.

    A request that finds the queue full takes the place of the newest request of the key with most waiting, if that has
    more than its own: one key cannot keep the others out by filling the queue.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.max_running = limits.max_running or 1
        """Sequences that are computed at once."""
        self.running_requests = 0
        self._running_sequences = 0
        self._waiting: dict[Key, deque[_Waiting]] = {}
        self._virtual_time = 0.0
        self._finish: dict[Key, float] = {}
        self._drain_rate = DrainRate(clock)

    @property
    def queued_requests(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def queued_tokens(self) -> int:
        """Tokens those may take."""
        return sum(waiting.work.tokens for waiting in self._all_waiting())

    def check(self, key: Key) -> None:
        """Refuse a request that would find no room, before anybody reads its body.

        Raises:
            RefusalError: 429; there is no room.
        """
        if self.queued_requests >= max(self.limits.queue_requests, 1) and not self._may_displace(key):
            raise self._full("queue_requests")

    async def enter(self, key: Key, work: Work) -> None:
        """Wait for a turn. ``leave`` must follow.

        Raises:
            RefusalError: 429, there is no room to wait or another key needed it; or what ``refuse_waiting`` was given.
        """
        waiting = _Waiting(key, work, max(self._virtual_time, self._finish.get(key, 0.0)))
        if not self._waiting and self._fits(work):
            self._start(waiting)
            return
        self._make_room(key, work)
        self._finish[key] = waiting.start + work.tokens
        self._waiting.setdefault(key, deque()).append(waiting)
        # A key that had nothing waiting may be first in line even now.
        self._admit()
        try:
            # Shielded, since until this task runs again the queue may still give it its turn, or send it away.
            await asyncio.shield(waiting.turn)
        except asyncio.CancelledError:
            if not waiting.turn.done():
                self._remove(waiting)
                self._admit()
            elif waiting.turn.exception() is None:
                # It was given its turn in the same instant: hand it on.
                self.leave(work)
            raise

    def leave(self, work: Work) -> None:
        """A request that was given its turn has ended."""
        self.running_requests -= 1
        self._running_sequences -= self._share(work)
        self._drain_rate.count()
        self._admit()

    def refuse_waiting(self, refusal: RefusalError) -> None:
        """Send everybody away who waits."""
        for waiting in list(self._all_waiting()):
            self._send_away(waiting, refusal)

    def _make_room(self, key: Key, work: Work) -> None:
        while self.queued_requests >= self.limits.queue_requests:
            self._displace(key, "queue_requests")
        while self.queued_tokens + work.tokens > self.limits.queue_tokens:
            self._displace(key, "queue_tokens")

    def _displace(self, key: Key, reason: str) -> None:
        if not self._may_displace(key):
            raise self._full(reason)
        longest = max(self._waiting.values(), key=len)
        self._send_away(longest[-1], self._full(reason))

    def _may_displace(self, key: Key) -> bool:
        longest = max(map(len, self._waiting.values()), default=0)
        return longest > len(self._waiting.get(key, ())) + 1

    def _full(self, reason: str) -> RefusalError:
        seconds = self._drain_rate.seconds_for(self.queued_requests + 1)
        return RefusalError(429, QUEUE_FULL, reason=reason, retry_after=seconds)

    def _send_away(self, waiting: _Waiting, refusal: RefusalError) -> None:
        self._remove(waiting)
        # What it would have used is not held against its key.
        self._finish[waiting.key] -= waiting.work.tokens
        waiting.turn.set_exception(refusal)

    def _remove(self, waiting: _Waiting) -> None:
        self._waiting[waiting.key].remove(waiting)
        if not self._waiting[waiting.key]:
            del self._waiting[waiting.key]

    def _admit(self) -> None:
        while self._waiting:
            first = min((queue[0] for queue in self._waiting.values()), key=lambda waiting: waiting.start)
            if not self._fits(first.work):
                return
            self._remove(first)
            self._start(first)
            first.turn.set_result(None)

    def _start(self, waiting: _Waiting) -> None:
        self.running_requests += 1
        self._running_sequences += self._share(waiting.work)
        self._virtual_time = max(self._virtual_time, waiting.start)
        self._finish[waiting.key] = max(self._finish.get(waiting.key, 0.0), waiting.start + waiting.work.tokens)

    def _fits(self, work: Work) -> bool:
        return self._running_sequences + self._share(work) <= self.max_running

    def _share(self, work: Work) -> int:
        """A request of more sequences than run at once runs alone."""
        return min(work.sequences, self.max_running)

    def _all_waiting(self) -> Iterator[_Waiting]:
        for queue in self._waiting.values():
            yield from queue
