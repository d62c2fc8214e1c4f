"""The handle on an engine's process, with the process replaced by a thread and vLLM by a stand-in."""

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

    def __init__(self, _folder: str, options: EngineOptions) -> None:
        Server.asked = options
        if options.max_num_seqs > 1000:
            raise ValueError(REFUSAL)

    def snapshot(self) -> None:
        raise KeyError("layer")


class Process(threading.Thread):
    """Stands in for the process; has its own end of the pipe, as that would."""

    def __init__(self, target: Callable[..., None], args: tuple[Connection, str, EngineOptions], daemon: bool) -> None:
        connection = Connection(os.dup(args[0].fileno()))
        super().__init__(target=target, args=(connection, *args[1:]), daemon=daemon)


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(engine.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(engine, "_EngineServer", Server)


@pytest.mark.parametrize(("stored", "dtype"), [("float16", "bfloat16"), ("float32", "float32")])
def test_auto_is_the_dtype_the_server_would_take(tmp_path: Path, stored: str, dtype: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    edit_config(folder, dtype=stored)
    with Engine(Checkpoint.open(folder), EngineOptions("auto")) as handle:
        handle.wait_ready()
        assert Server.asked == EngineOptions("auto", dtype=dtype)


def test_what_vllm_refuses_is_said_in_its_last_words(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    with (
        Engine(checkpoint, EngineOptions("auto", max_num_seqs=2000)) as handle,
        pytest.raises(UserError, match=r"there is no room$"),
    ):
        handle.wait_ready()


def test_a_bug_in_the_process_comes_with_its_traceback(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    with Engine(checkpoint, EngineOptions("auto")) as handle:
        handle.wait_ready()
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError"):
            handle.snapshot()
