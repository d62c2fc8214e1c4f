"""How vLLM's processes wait for each other: on a CPU in short sleeps, where vLLM spins, and nowhere at the cost of memory."""

import ctypes
import time

import zmq
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


def forget_notifications() -> None:
    """Let a reader of such a queue drop, once a second, what its socket was told of messages it has read already.

    vLLM's reader looks at the socket only after a second without a message. Until then ZeroMQ keeps 40 bytes for each, though the
    socket is to keep the last one only: at 200 messages a second half a megabyte a minute, in the engine and in every worker,
    for as long as there is work.
    """
    shm_broadcast.SpinCondition.record_read = _record_read


def _record_read(self: shm_broadcast.SpinCondition) -> None:
    now = time.monotonic()
    # Asking what there is to do is how a socket takes in what its background thread has told it.
    if self.is_reader and now - getattr(self, "asked_at", 0.0) >= 1:
        self.local_notify_socket.getsockopt(zmq.EVENTS)
        self.asked_at = now
    self.last_read = now
