"""The handle on an engine's process, with the process replaced by a thread and vLLM by a stand-in."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_backend.bench import engine
from sparse_backend.bench.engine import Engine, EngineOptions
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from tests.checkpoints import edit_config, write_tiny_checkpoint

REFUSAL = """1 validation error for ModelConfig
  Value error, there is no room
    For further information visit https://example.org
"""


class Server:
    """Stands in for vLLM's side."""

    asked: EngineOptions
    may_start = threading.Event()
    failure: Exception | None = None

    def __init__(self, _folder: str, _model_class: str, options: EngineOptions) -> None:
        Server.asked = options
        Server.may_start.wait()
        if Server.failure:
            raise Server.failure

    def snapshot(self) -> None:
        raise KeyError("layer")

    def start_recording(self) -> None:
        raise SystemExit


class Process(threading.Thread):
    """Stands in for the process; has its own end of the pipe, as that would."""

    def __init__(
        self, target: Callable[..., None], args: tuple[Connection, str, str, EngineOptions], daemon: bool
    ) -> None:
        self.connection = Connection(os.dup(args[0].fileno()))
        super().__init__(target=target, args=(self.connection, *args[1:]), daemon=daemon)
        self.killed = False
        self.exitcode = -9

    def run(self) -> None:
        with self.connection, contextlib.suppress(SystemExit):
            super().run()

    def kill(self) -> None:
        """A thread cannot be killed: it goes on, and finds nobody to talk to."""
        self.killed = True
        Server.may_start.set()


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(engine.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(engine, "_EngineServer", Server)
    monkeypatch.setattr(Server, "failure", None)
    Server.may_start.set()


@pytest.mark.parametrize(("stored", "dtype"), [("float16", "bfloat16"), ("float32", "float32")])
def test_auto_is_the_dtype_the_server_would_take(tmp_path: Path, stored: str, dtype: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    edit_config(folder, dtype=stored)
    with Engine(Checkpoint.open(folder), EngineOptions("auto")) as handle:
        handle.wait_ready()
        assert Server.asked == EngineOptions("auto", dtype=dtype)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ValueError(REFUSAL), "vLLM cannot run this model so: Value error, there is no room"),
        (AssertionError(), r"vLLM cannot run this model so: AssertionError\(\)"),
        (ModuleNotFoundError("No module named 'flashinfer'"), "No module named 'flashinfer'. .*make install.*"),
    ],
)
def test_why_vllm_does_not_start_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, said: str
) -> None:
    monkeypatch.setattr(Server, "failure", failure)
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    with Engine(checkpoint, EngineOptions("auto")) as handle, pytest.raises(UserError, match=f"{said}$"):
        handle.wait_ready()


@pytest.mark.parametrize("failure", [None, ValueError(REFUSAL)])
def test_an_engine_that_is_still_starting_is_ended_at_once_and_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    monkeypatch.setattr(Server, "failure", failure)
    Server.may_start.clear()
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    raised: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with Engine(checkpoint, EngineOptions("auto")) as handle:
        process = handle._process
    assert process.killed
    assert not process.is_alive()
    assert not raised


def test_an_engine_that_is_ready_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destroyed: list[bool] = []
    groups = SimpleNamespace(is_initialized=lambda: True, destroy_process_group=lambda: destroyed.append(True))
    monkeypatch.setattr(engine, "distributed", groups)
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    with Engine(checkpoint, EngineOptions("auto")) as handle:
        handle.wait_ready()
        process = handle._process
    assert not process.killed
    assert destroyed == [True]


def test_a_bug_in_the_process_comes_with_its_traceback(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    with Engine(checkpoint, EngineOptions("auto")) as handle:
        handle.wait_ready()
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError"):
            handle.snapshot()


def test_a_process_that_has_ended_is_told_of_at_every_call(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    with Engine(checkpoint, EngineOptions("auto")) as handle:
        handle.wait_ready()
        for _ in range(2):
            with pytest.raises(UserError, match="ended with exit code -9"):
                handle.start_recording()


def test_what_keeps_the_process_quiet_does_not_stay_in_our_environment(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    before = dict(os.environ)
    with Engine(checkpoint, EngineOptions("auto")) as handle:
        handle.wait_ready()
        assert dict(os.environ) == before
