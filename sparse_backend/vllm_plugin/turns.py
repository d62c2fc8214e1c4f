"""In which order waiting requests are let in."""

import itertools
from collections.abc import Callable

from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import Request, RequestStatus

# Seconds per prompt token, of which reading it takes a twentieth or less. Others: docs/results/h200-2026-11-29-batching.md.
_HEAD_START = 1e-3


def turn(arrived: float, prompt_tokens: int, most_s: float) -> float:
    """When a request has its turn: as if a longer prompt had come later, but never by more than ``most_s``.

    So whoever has waited gets ahead of shorter prompts sooner or later, and nobody is overtaken by one that came more than
    ``most_s`` after it.
    """
    return arrived + min(prompt_tokens * _HEAD_START, most_s)


class TurnQueue(FCFSRequestQueue):
    """Lets new requests in by their turns. Those that vLLM puts back, such as preempted ones, stay in front."""

    def __init__(self, turn_of: Callable[[Request], float]) -> None:
        super().__init__()
        self._turn_of = turn_of

    def add_request(self, request: Request) -> None:
        """Behind all whose turn is not later."""
        of_new = self._turn_of(request)
        later = itertools.takewhile(
            lambda other: other.status != RequestStatus.PREEMPTED and self._turn_of(other) > of_new, reversed(self)
        )
        self.insert(len(self) - sum(1 for _ in later), request)
