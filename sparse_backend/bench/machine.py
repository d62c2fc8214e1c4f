"""What a benchmark ran on: names, versions and the rate at which memory can be read."""

import itertools
import subprocess
import time
from collections.abc import Callable
from typing import TypedDict

import torch
from torch.nn import functional as F

from sparse_backend.ffn import native, paths

_READ_BYTES = {"cpu": 2**29, "cuda": 2**31}
_READ_REPEATS = 20


class Machine(TypedDict):
    """One document's worth of context."""

    device: str
    name: str
    """Of the CPU or the GPU."""
    threads: int | None
    """torch's; None on a GPU."""
    driver: str | None
    """Version of the GPU's driver; None on a CPU, or where nvidia-smi does not tell."""
    torch: str
    cuda: str | None
    """The version torch was built with; None on a CPU."""
    kernels: str
    """Instruction set of the native kernels in use."""
    read_bytes_per_s: float
    """The highest of a few simple ways to read 2 GiB (512 MiB on a CPU)."""


def describe(device: torch.device) -> Machine:
    """Look at the machine and measure how fast it reads."""
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": paths.processor_name(device.type),
        "threads": None if on_cuda else torch.get_num_threads(),
        "driver": _driver() if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "kernels": native.kernel_info(device.type).isa,
        "read_bytes_per_s": read_rate(device),
    }


def read_rate(device: torch.device) -> float:
    """Bytes per second of the fastest of a sum, a maximum and a matrix-vector product over random numbers."""
    columns = 8192
    size = _READ_BYTES[device.type]
    values = torch.randn(size // (4 * columns), columns, device=device)
    half = values.to(torch.bfloat16).repeat(2, 1)
    vector = torch.randn(1, columns, device=device, dtype=torch.bfloat16)
    ways: list[Callable[[], torch.Tensor]] = [values.sum, values.amax, lambda: F.linear(vector, half)]
    with torch.inference_mode():
        return size / min(_seconds(way, device) for way in ways)


def _seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The shortest of a few runs: what the memory can do, not what it does on average."""
    call()
    if device.type == "cpu":
        times = []
        for _ in range(_READ_REPEATS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_READ_REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in itertools.pairwise(events)) / 1e3


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.split("\n", 1)[0].strip() or None
