"""How vLLM's processes wait for each other on a CPU: in short sleeps, where vLLM itself spins."""

import ctypes
import time

from vllm.distributed.device_communicators import shm_broadcast

# Seconds of one sleep. Measured beside vLLM's loop and longer sleeps: docs/results/trust-2026-11-27.md.
_SLEEP = 10e-6
# linux/prctl.h; nanoseconds. By default the kernel makes each sleep up to 50 µs longer.
_PR_SET_TIMERSLACK = 29
_SLACK = 1000


def sleep_while_waiting() -> None:
    """Let the engine and its workers sleep until the other has written to their queue in shared memory.

    vLLM calls ``sched_yield`` in a loop for up to a second after each message. On a GPU machine that costs a spare core. On a
    CPU the cores are those that compute, and Linux 6.18 lets such a loop keep processes of other sessions from running: a
    client on the same two cores got no time for up to five seconds.
    """
    # Of this thread and all that it starts later. A kernel that does not know it sleeps a little longer.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK, 0, 0, 0)
    shm_broadcast.sched_yield = _sleep


def _sleep() -> None:
    time.sleep(_SLEEP)
