"""The time on the device, between two of its kernels.

With asynchronous scheduling the host launches a step while the one before still runs, and learns late that a step has ended: a
step of more rows than CUDA graphs are captured for takes it some 30 ms to launch, and seen from the host the step before took
those.
"""

import time

import torch
from vllm.triton_utils import tl, triton


@triton.jit
def _read(nanoseconds):  # type: ignore[no-untyped-def]
    tl.store(nanoseconds, tl.extra.cuda.globaltimer())


def read(nanoseconds: torch.Tensor) -> None:
    """Queue a reading, behind what was launched so far on this stream; two of one device can be compared.

    Args:
        nanoseconds: int64 [1], set to it. On a CPU, whose kernels are done when they return, it is the host's clock.
    """
    if nanoseconds.is_cuda:
        _read[(1,)](nanoseconds, num_warps=1)
    else:
        nanoseconds.fill_(time.perf_counter_ns())
