"""What is known of one request while it is answered, reachable from everything that its task calls."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """One request, from its headers to the last byte of its answer. Times are ``time.monotonic`` seconds."""

    id: str
    method: str
    path: str
    """As the client spelt it, shortened."""
    arrived: float = field(default_factory=time.monotonic)
    key: str | None = None
    """Name of the API key; None without one."""
    status: int | None = None
    """None until the answer has begun."""
    queued: float = 0.0
    """Seconds spent waiting for admission."""
    prompt: object = None
    """The prompt or messages as the client sent them."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    longest_output: int = 0
    """Tokens of the longest sequence."""
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival, so that waiting counts; None if there was no token."""
        return None if self.first_token_at is None else max(0.0, self.first_token_at - self.arrived)

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds between tokens of the longest sequence; None if it had fewer than two."""
        if self.first_token_at is None or self.last_token_at is None or self.longest_output < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.longest_output - 1)


current_request: ContextVar[RequestRecord] = ContextVar("current_request")
