"""Answers of a model too small to be relied on."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until_complete(attempt: Callable[[int], T | None]) -> T:
    """The first answer that was not cut, of eight seeds.

    So small a model goes on with spaces now and then, which JSON allows, until it has used its tokens up.
    """
    for seed in range(8):
        if (answer := attempt(seed)) is not None:
            return answer
    raise AssertionError("none of eight answers was complete")
