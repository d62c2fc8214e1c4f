"""Per-key rate limits: token buckets that hold what a key may use in one minute."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import RefusalError
from server.limits import AdmissionLimits

_USED_UP = "This key has used up its {} per minute."


@dataclass
class Bucket:
    """Fills at ``per_minute``/60 a second up to ``per_minute``; may be overdrawn, and is then closed until it is paid back."""

    per_minute: int
    level: float
    at: float

    def fill(self, now: float) -> None:
        """Add what flowed in since the last time."""
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, amount: float) -> float:
        """Seconds until ``amount`` (at most a full bucket) is there."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)


class KeyRates:
    """The buckets of all keys."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._requests: dict[str | None, Bucket] = {}
        self._tokens: dict[str | None, Bucket] = {}

    def take_request(self, key: str | None) -> None:
        """Count one request.

        Raises:
            RefusalError: 429; the key has used up its requests or tokens.
        """
        tokens = self._bucket(self._tokens, key, self._limits.key_tokens_per_minute)
        if tokens is not None and (seconds := tokens.seconds_until(1)):
            raise RefusalError(429, _USED_UP.format("tokens"), reason="key_rate", retry_after=seconds)
        requests = self._bucket(self._requests, key, self._limits.key_requests_per_minute)
        if requests is not None:
            if seconds := requests.seconds_until(1):
                raise RefusalError(429, _USED_UP.format("requests"), reason="key_rate", retry_after=seconds)
            requests.level -= 1

    def take_tokens(self, key: str | None, tokens: int) -> None:
        """Charge what a request came to; known only at its end, so it may overdraw."""
        bucket = self._bucket(self._tokens, key, self._limits.key_tokens_per_minute)
        if bucket is not None:
            bucket.level -= tokens

    def _bucket(self, buckets: dict[str | None, Bucket], key: str | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        now = self._clock()
        bucket = buckets.setdefault(key, Bucket(per_minute, per_minute, now))
        bucket.fill(now)
        return bucket
