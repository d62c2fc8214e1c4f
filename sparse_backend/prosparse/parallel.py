"""Independent runs side by side: processes with a device each, of which every one takes the next run when its own is done."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.queues import SimpleQueue
from threading import Thread

import torch

from sparse_backend.errors import UserError

_GPUS = "CUDA_VISIBLE_DEVICES"


def side_by_side(work: Callable[[str], None], names: Sequence[str], processes: int) -> None:
    """Call ``work`` with every name, in order, in up to ``processes`` processes at a time.

    Where there are GPUs each process sees one of them, in turn, as its only one. A process in which ``work`` fails prints the
    error and takes no further names; the others go on with theirs.

    Args:
        work: can be pickled.
        names: of the calls.
        processes: how many.

    Raises:
        UserError: a process failed; what its own error was stands above on stderr.
    """
    context = get_context("spawn")  # a fork of a process that used a GPU cannot use one
    queue = context.SimpleQueue()
    packed = pickle.dumps(
        work
    )  # by itself, so that tensors go through the pipe and not through /dev/shm, which may be small
    started = []
    try:
        for index in range(min(processes, len(names))):
            with _one_gpu(index):
                process = context.Process(target=_take, args=(packed, queue), daemon=False)
                process.start()
            started.append(process)
        for name in [*names, *[None] * len(started)]:
            queue.put(name)
        for process in started:
            process.join()
    finally:
        for process in started:
            process.terminate()
    failed = sum(process.exitcode != 0 for process in started)
    if failed:
        raise UserError(f"{failed} of {len(started)} processes failed; their errors stand above")


@contextmanager
def _one_gpu(index: int) -> Iterator[None]:
    """Let processes started in the block see one GPU of this process', the one whose turn it is."""
    before = os.environ.get(_GPUS)
    if torch.cuda.is_available():
        visible = before.split(",") if before else [str(number) for number in range(torch.cuda.device_count())]
        os.environ[_GPUS] = visible[index % len(visible)]
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_GPUS, None)
        else:
            os.environ[_GPUS] = before


def _take(packed: bytes, queue: "SimpleQueue[str | None]") -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    work: Callable[[str], None] = pickle.loads(packed)  # noqa: S301 - what our own parent packed
    try:
        while (name := queue.get()) is not None:
            work(name)
    except UserError as error:
        print(f"prosparse: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _end_with_parent() -> None:
    """A parent that was killed is started again by somebody, who would meet its children at work in the same folder."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
