"""Types of command-line values that the benchmarks share."""

import argparse

ENGINE_DTYPES = ("auto", "bfloat16", "float32")
"""Values of --dtype for a benchmark that runs an engine; "auto" is the checkpoint's own."""


def positive_int(text: str) -> int:
    """Parse one whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is below 1")
    return number


def row_counts(text: str) -> list[int]:
    """Parse a comma-separated list of positive integers, such as ``1,2,4``."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of whole numbers") from None
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return counts
