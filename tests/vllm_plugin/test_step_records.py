"""Row counts from the worker to the scheduler, both ends in one process."""

import time
from pathlib import Path

import pytest
import torch

from sparse_backend.ffn import counters
from sparse_backend.ffn.counters import DENSE, ROWS, SPARSE, STEPS
from sparse_backend.vllm_plugin import device_clock
from sparse_backend.vllm_plugin.step_records import StepRecordReader, StepRecordWriter, WorkerFacts

FACTS: WorkerFacts = {"neurons": 100, "max_sparse_rows": [4], "sparse_us": [(1, 0.1, 20.0)], "dense_us": [(1, 70.0)]}


class Worker:
    """What the layers do."""

    def __init__(self, file: Path, *, drelu: bool = False) -> None:
        self.counters = counters.new_counters(drelu=drelu)
        self.row_active = torch.zeros(16, dtype=torch.int32)
        self.now = 0
        self.writer = StepRecordWriter(
            file, self.counters, self.row_active, FACTS, read_clock=lambda nanoseconds: nanoseconds.fill_(self.now)
        )

    def step(self, *active: int, path: int = DENSE) -> None:
        """One step whose rows activate so many neurons each."""
        self.row_active[: len(active)] += torch.tensor(active, dtype=torch.int32)
        self.counters[path, ROWS] += len(active)
        self.counters[path, STEPS] += 1
        self.now += 1000 * len(active)
        self.writer.publish()


@pytest.fixture(params=[False, True], ids=["relu", "drelu"])
def ends(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Worker, StepRecordReader]:
    worker = Worker(tmp_path / "rows", drelu=request.param)
    return worker, StepRecordReader(tmp_path / "rows")


def test_facts_arrive_and_the_files_name_is_gone(ends: tuple[Worker, StepRecordReader], tmp_path: Path) -> None:
    assert ends[1].facts == {**FACTS, "sparse_us": [[1, 0.1, 20.0]], "dense_us": [[1, 70.0]]}
    assert list(tmp_path.iterdir()) == []


def test_each_step_is_told_apart_also_if_the_worker_is_ahead(ends: tuple[Worker, StepRecordReader]) -> None:
    worker, reader = ends
    steps = [(5, 7), (1,), (2, 3, 4), (9,), (1, 1)]
    worker.step(*steps[0])
    ended_at = 0
    for now, following in zip(steps, [*steps[1:], (0,)], strict=True):
        worker.step(*following, path=SPARSE)
        worker.writer.publish()  # once more for the same step, as for the log-probabilities of a prompt
        step = reader.next_step(len(now))
        assert step is not None
        assert step.active.tolist() == list(now)
        ended_at += 1000 * len(now)
        assert step.ended_at == ended_at


def test_counts_wrap_around(ends: tuple[Worker, StepRecordReader]) -> None:
    worker, reader = ends
    for _ in range(3):
        worker.step(2**31 - 1)
        step = reader.next_step(1)
        assert step is not None
        assert step.active.tolist() == [2**31 - 1]


def test_what_is_missing_is_none_until_caught_up(ends: tuple[Worker, StepRecordReader]) -> None:
    worker, reader = ends
    assert reader.next_step(2) is None
    worker.step(1, 2)
    worker.step(3)
    reader.catch_up()
    worker.step(4, 5, 6)
    assert reader.next_step(2) is None, "another number of rows"
    reader.catch_up()
    worker.step(8)
    step = reader.next_step(1)
    assert step is not None
    assert step.active.tolist() == [8]


def test_a_reset_starts_anew(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "rows")
    for _ in range(3):
        worker.step(40, 50)  # the warm-up
    reader = StepRecordReader(tmp_path / "rows")
    worker.counters.zero_()
    worker.writer.reset()
    worker.step(6)
    step = reader.next_step(1)
    assert step is not None
    assert step.active.tolist() == [6]


def test_the_clock_of_a_cpu_is_the_hosts() -> None:
    reading = torch.zeros(1, dtype=torch.int64)
    before = time.perf_counter_ns()
    device_clock.read(reading)
    assert before <= int(reading) <= time.perf_counter_ns()


def test_files_that_are_there_or_not_are_errors(tmp_path: Path) -> None:
    (tmp_path / "rows").touch()
    with pytest.raises(OSError, match="rows"):
        Worker(tmp_path / "rows")
    with pytest.raises(OSError, match="none"):
        StepRecordReader(tmp_path / "none")
