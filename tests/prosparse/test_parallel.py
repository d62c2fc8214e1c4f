"""Runs side by side, with work that takes no model."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sparse_backend.errors import UserError
from sparse_backend.prosparse.parallel import side_by_side

ROOT = Path(__file__).parents[2]
NAMES = ["a", "b", "bad", "c", "d", "e"]


def note(folder: Path, name: str) -> None:
    """Leave a file with the process' id."""
    (folder / name).write_text(str(os.getpid()))


def note_together(folder: Path, name: str) -> None:
    """Note, but fail with one name, and with the first one wait for the second: that is left to the other process."""
    if name == "bad":
        raise UserError("bad is bad")
    note(folder, name)
    if name == "a":
        _once((folder / "b").is_file)


def wait_for_ever(folder: Path, name: str) -> None:
    note(folder, name)
    time.sleep(600)


def test_every_name_is_taken_once_and_a_failure_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="1 of 2 processes failed"):
        side_by_side(partial(note_together, tmp_path), NAMES, processes=2)
    assert "prosparse: error: bad is bad" in capfd.readouterr().err
    done = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(done) == ["a", "b", "c", "d", "e"]
    assert len(set(done.values())) == 2
    assert os.getpid() not in done.values()


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "from functools import partial; from pathlib import Path\n"
        "from sparse_backend.prosparse.parallel import side_by_side\n"
        "from tests.prosparse.test_parallel import wait_for_ever\n"
        f"side_by_side(partial(wait_for_ever, Path({str(tmp_path)!r})), ['a'], 1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        child = int(_once(lambda: (tmp_path / "a").is_file() and (tmp_path / "a").read_text()))
        parent.kill()
    _once(lambda: not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text())


def _once(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result
