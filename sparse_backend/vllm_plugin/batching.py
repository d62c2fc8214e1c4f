"""What the server tells the scheduler, which runs in a process of its own, and what the scheduler tells the server."""

import contextlib
import json
import logging
import os
import socket
from pathlib import Path
from typing import Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from sparse_backend.vllm_plugin import snapshot

logger = logging.getLogger(__name__)

SETTINGS_VARIABLE = "PROSPARSE_BATCHING_SETTINGS"
"""The settings, JSON. Not in vLLM's configuration, which is part of the key under which compiled graphs are kept."""

SCHEDULER = "sparse_backend.vllm_plugin.scheduler.SparseScheduler"
"""The scheduler class, by the name vLLM finds it under."""

Decision = Literal["admit", "chunk_full", "chunk_cut", "hold_back", "fcfs"]
Fallback = Literal["counters", "clock"]


class BatchingSettings(BaseModel):
    """How steps are put together; times in milliseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["fcfs", "sparse"] = "fcfs"
    itl_slo_ms: float | None = Field(None, gt=0)
    ttft_slo_ms: float | None = Field(None, gt=0)
    max_unfairness_ms: float = Field(1000, ge=0)
    report_to: str | None = None
    """Path of the datagram socket that reports go to."""
    step_log: str | None = None
    """Path of the file that each step is appended to."""

    @property
    def has_objective(self) -> bool:
        """Without one steps are those of first come, first served."""
        return self.itl_slo_ms is not None or self.ttft_slo_ms is not None

    @classmethod
    def from_environment(cls) -> Self:
        """What the server set; the defaults without a server."""
        return cls.model_validate_json(os.environ.get(SETTINGS_VARIABLE, "{}"))


class FinishedRequest(TypedDict):
    """One request that has its answer."""

    id: str
    """As vLLM's engine knows it."""
    density: float
    """Share of active neurons, mean over all its rows."""
    rows: int


class Report(TypedDict):
    """What has come of it, of one replica."""

    replica: int
    decisions: dict[Decision, int]
    """Since the start."""
    fallbacks: dict[Fallback, int]
    errors: dict[snapshot.Path, float]
    """Median relative error of the predicted step times, of paths that were taken."""
    running: list[float]
    """Densities of the running requests."""
    finished: list[FinishedRequest]
    """Since the last report."""


class LoggedStep(TypedDict):
    """One step as the cost model saw it; those from ``rows`` to ``after_prefill`` are the fields of ``cost.StepShape``."""

    path: snapshot.Path
    rows: int
    prefill_tokens: int
    context: int
    prefill_context: int
    union: float
    after_prefill: bool
    seconds: float
    """From the end of the step before on the device; after a pause, or without counters, what the host saw of it."""
    host_seconds: float
    """From when the host learnt of the end of the step before to when it learnt of its own."""
    predicted: float
    """Seconds, before the model had learnt from it; the planner's own prediction may be a few steps older."""
    after_idle: bool
    replica: int


class StepLog:
    """A line of JSON for each step, appended; lines of several replicas may take turns. The first that fails is the last."""

    def __init__(self, path: Path | str) -> None:
        self._path, self._file = Path(path), None
        try:
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, step: LoggedStep) -> None:
        """Append one."""
        if self._file is not None:
            try:
                self._file.write(json.dumps(step).encode() + b"\n")
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Append no more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        logger.warning("--step-log %s: %s. No more steps are written to it.", self._path, error.strerror)
        self.close()


class Reporter:
    """Sends reports; never waits, and drops one that nobody takes."""

    def __init__(self, path: Path | str) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, report: Report) -> None:
        """Send one."""
        with contextlib.suppress(OSError):
            self._socket.sendto(json.dumps(report).encode(), self._path)

    def close(self) -> None:
        """Send no more."""
        self._socket.close()
