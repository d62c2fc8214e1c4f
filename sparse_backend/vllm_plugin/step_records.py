"""What each step was: its rows' active neurons and when it ended, on their way from the worker to the scheduler in shared memory.

The layers add to one int32 per row of the step, and nobody sets it to zero: a step's counts are the difference of two readings,
modulo 2^32. After each forward pass the worker queues a copy into the next of a few slots, behind the pass on the device's
stream; nobody waits for it. By the time the scheduler is given the step's tokens, which are copied later, the counts are there.
Which step a slot is of, the first layer's counters tell, copied along: their number of steps since they were last set to zero.
So is the device's time.

Rank 0 of a tensor-parallel group writes, for its share of the neurons.
"""

import atexit
import contextlib
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from sparse_backend.ffn.counters import ROWS, STEPS, shape
from sparse_backend.vllm_plugin import device_clock

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_FOLDER = Path("/dev/shm")  # noqa: S108 - the name in it is this engine's own, and opened exclusively
_SLOTS = 8  # more than steps can be under way
_FACTS_BYTES = 1 << 16
_PATHS_SHAPE = shape()
_COUNTERS = _PATHS_SHAPE[0] * _PATHS_SHAPE[1]
_HEAD_BYTES = 8 * (_COUNTERS + 1)  # and the time
_PAGE = mmap.PAGESIZE


class WorkerFacts(TypedDict):
    """What the scheduler needs to know of the worker's layers."""

    neurons: int
    """Of all layers of this rank together."""
    max_sparse_rows: list[int]
    """Per layer of this rank, up to how many rows it takes the sparse path."""
    sparse_us: list[tuple[int, float, float]]
    """Measured for one layer on the sparse path: rows, share of neurons in their union, microseconds. Empty without a table."""
    dense_us: list[tuple[int, float]]
    """The same on the dense path: rows, microseconds."""


def file_of(vllm_config: "VllmConfig") -> Path:
    """The file of one engine; the replicas of data parallelism have one each."""
    return _FOLDER / f"prosparse-{vllm_config.instance_id}-{vllm_config.parallel_config.data_parallel_index}"


def most_rows(vllm_config: "VllmConfig") -> int:
    """Rows of the widest step, padding included."""
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, largest_graph)


def _slot_bytes(rows: int) -> int:
    return -(-(_HEAD_BYTES + 4 * rows) // _PAGE) * _PAGE


class StepRecord(NamedTuple):
    """Of one step."""

    active: npt.NDArray[np.int32]
    """Neurons of each row, [rows], summed over layers."""
    ended_at: int
    """Nanoseconds, by the device's clock; behind the layers, before tokens are sampled."""


class StepRecordWriter:
    """The worker's side."""

    def __init__(
        self,
        file: Path,
        counters: torch.Tensor,
        row_active: torch.Tensor,
        facts: WorkerFacts,
        read_clock: Callable[[torch.Tensor], None] = device_clock.read,
    ) -> None:
        """Create the file.

        Args:
            file: as ``file_of`` says; must not exist.
            counters: of the worker's first layer, int64; their first rows, [2, 4], are of the two paths.
            row_active: int32 [rows], what the layers add to.
            facts: of the worker's layers.
            read_clock: queues a reading of the device's clock into an int64 [1], nanoseconds.

        Raises:
            OSError: the file cannot be made, or a GPU cannot write to its memory.
        """
        self._read_clock = read_clock
        self._ended_at = torch.zeros(1, dtype=torch.int64, device=row_active.device)
        # Compiled now, not in the first step.
        read_clock(self._ended_at)
        # The counters, by which a slot is found, are copied last.
        self._sources = row_active, self._ended_at, counters[: _PATHS_SHAPE[0]]
        rows = row_active.shape[0]
        size = _FACTS_BYTES + _SLOTS * _slot_bytes(rows)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
            # Unless the scheduler has taken it away, as it does first thing.
            atexit.register(file.unlink, missing_ok=True)
        finally:
            os.close(descriptor)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        if row_active.is_cuda:
            # Only into pinned memory does a copy run beside the host.
            error = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), size, 0)
            if error.value:
                # CUDA would report the error once more, to whoever asks next.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=row_active.device)
                file.unlink()
                raise OSError(f"{file} cannot be pinned: {error}")
        self._slots = []
        for index in range(_SLOTS):
            slot = whole[_FACTS_BYTES + index * _slot_bytes(rows) :]
            self._slots.append(
                (
                    slot[_HEAD_BYTES : _HEAD_BYTES + 4 * rows].view(torch.int32),
                    slot[8 * _COUNTERS : _HEAD_BYTES].view(torch.int64),
                    slot[: 8 * _COUNTERS].view(torch.int64).view(_PATHS_SHAPE),
                )
            )
        self._next = 0
        text = json.dumps({**facts, "rows": rows}).encode()
        self._memory[: len(text)] = text

    def reset(self) -> None:
        """Forget all rows; waits for the device, which must have nothing to do."""
        row_active = self._sources[0]
        row_active.zero_()
        if row_active.is_cuda:
            torch.cuda.synchronize()
        for slot in self._slots:
            for part in slot:
                part.zero_()

    def publish(self) -> None:
        """Queue a copy of the counts and the time as they are after what was launched so far. Call it on the model's stream."""
        self._read_clock(self._ended_at)
        for source, target in zip(self._sources, self._slots[self._next], strict=True):
            target.copy_(source, non_blocking=True)
        self._next = (self._next + 1) % _SLOTS


class StepRecordReader:
    """The scheduler's side."""

    def __init__(self, file: Path) -> None:
        """Open the file and take its name away, so that it goes with the processes that have it open.

        Raises:
            OSError: there is none.
        """
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        file.unlink()
        content = json.loads(self._memory[:_FACTS_BYTES].rstrip(b"\0"))
        rows = content.pop("rows")
        self.facts: WorkerFacts = content
        self._counters, self._ended_at, self._rows = [], [], []
        for index in range(_SLOTS):
            start = _FACTS_BYTES + index * _slot_bytes(rows)
            self._counters.append(
                np.frombuffer(self._memory, np.int64, _COUNTERS, start).reshape(_PATHS_SHAPE),
            )
            self._ended_at.append(np.frombuffer(self._memory, np.int64, 1, start + 8 * _COUNTERS))
            self._rows.append(np.frombuffer(self._memory, np.int32, rows, start + _HEAD_BYTES))
        self._step = 0
        self._total_rows = 0
        self._before = np.zeros(rows, np.int32)

    def next_step(self, rows: int) -> StepRecord | None:
        """The next step; None if it is missing.

        Missing are counts that never came, or are of another number of rows: then something else was computed than the steps the
        caller knows of. The step after that is compared with what is there by then.

        Args:
            rows: of the step, padding not counted.
        """
        self._step += 1
        for counters, ended_at, row_active in zip(self._counters, self._ended_at, self._rows, strict=True):
            if int(counters[:, STEPS].sum()) == self._step:
                # A copy of its own: the slot will be written again.
                now, total_rows = row_active.copy(), int(counters[:, ROWS].sum())
                counts = (now - self._before)[:rows]
                fits = total_rows - self._total_rows == rows
                self._before, self._total_rows = now, total_rows
                return StepRecord(counts, int(ended_at[0])) if fits else None
        return None

    def catch_up(self) -> None:
        """After counts were missing: go on from the newest there are."""
        newest = max(range(_SLOTS), key=lambda index: int(self._counters[index][:, STEPS].sum()))
        self._step = int(self._counters[newest][:, STEPS].sum())
        self._before = self._rows[newest].copy()
        self._total_rows = int(self._counters[newest][:, ROWS].sum())
