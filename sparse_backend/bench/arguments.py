"""Types and checks of command-line values that the benchmarks share."""

import argparse

import torch

from sparse_backend.errors import UserError

ENGINE_DTYPES = ("auto", "bfloat16", "float16", "float32")
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


def positive_ints(text: str) -> list[int]:
    """Parse a comma-separated list of positive integers, such as ``1,2,4``."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of whole numbers") from None
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return counts


def densities(text: str) -> list[float]:
    """Parse a comma-separated list of shares, such as ``0.05,0.107``."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from None
    # Written so that NaN is refused as well.
    for share in shares:
        if not 0 <= share <= 1:
            raise argparse.ArgumentTypeError(f"{share:g} is not between 0 and 1")
    return shares


def check_shape(d_model: int, d_ff: int) -> None:
    """Refuse a shape the op does not take.

    Raises:
        UserError: one of them is no positive multiple of 8.
    """
    for flag, size in (("--d-model", d_model), ("--d-ff", d_ff)):
        if size <= 0 or size % 8:
            raise UserError(f"{flag} is {size}, but the kernels take positive multiples of 8.")


def check_dtype(dtype: str, device_type: str) -> None:
    """Refuse a dtype that the op does not compute in on a device.

    Raises:
        UserError: it is float16 on a CPU.
    """
    if dtype == "float16" and device_type == "cpu":
        raise UserError("--dtype float16 needs a GPU: on a CPU the kernels take bfloat16 and float32.")


def check_device(device_type: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: "cuda" without a GPU.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no NVIDIA GPU here. Check the driver, or give --device cpu.")
