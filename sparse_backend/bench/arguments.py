"""Types of command-line values that the benchmarks share."""

import argparse


def row_counts(text: str) -> list[int]:
    """Parse a comma-separated list of positive integers, such as ``1,2,4``."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of whole numbers") from None
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return counts
