import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_backend.errors import UserError
from sparse_backend.prosparse.workspace import (
    checkpoint_folder,
    discard_incomplete,
    last_complete,
    mark_complete,
    opened,
)

SETTINGS = {"recipe": {"training": {"batch": 8}, "stages": [{"peak": 0.1}]}}


def save(trainer: Path, step: int, complete: bool = True) -> Path:
    """A checkpoint as the Trainer leaves it."""
    folder = checkpoint_folder(trainer, step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if complete:
        mark_complete(folder, {"seconds": float(step)})
    return folder


def test_finished_checkpoint_takes_the_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    with opened(tmp_path / "out", SETTINGS) as workspace:
        (workspace.checkpoint / "config.json").write_text("{}")
        workspace.record("base", {"loss": 1.0})
        workspace.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_phases_are_there_for_the_same_settings(tmp_path: Path) -> None:
    with opened(tmp_path / "out", SETTINGS) as workspace:
        assert workspace.result("base") is None
        workspace.record("base", {"loss": 1.0})
    with opened(tmp_path / "out", SETTINGS) as workspace:
        assert workspace.result("base") == {"loss": 1.0}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with opened(tmp_path / "out", SETTINGS):
        pass
    other = {"recipe": {"training": {"batch": 16}, "stages": [{"peak": 0.1}]}}
    with pytest.raises(UserError, match=r"recipe.training.batch is 8 there, 16 here"), opened(tmp_path / "out", other):
        pass


def fail(out: Path, error: Exception, step: int | None = None) -> None:
    """A run that fails, after saving a checkpoint if ``step`` is given."""
    with opened(out, SETTINGS) as workspace:
        workspace.record("base", {"loss": 1.0})
        if step is not None:
            save(workspace.trainer, step)
        raise error


def test_failure_before_anything_was_done_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus"):
        fail(tmp_path / "out", UserError("no corpus"))
    assert not list(tmp_path.iterdir())


def test_failure_after_a_checkpoint_keeps_it_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No space left.*the same command goes on"):
        fail(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"), step=10)
    assert (tmp_path / "out.partial" / "trainer" / "checkpoint-10").is_dir()


def test_folder_of_a_running_process_is_refused_and_of_a_killed_one_taken(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from sparse_backend.prosparse.workspace import opened\n"
        f"with opened(Path({str(tmp_path / 'out')!r}), {SETTINGS!r}): print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="in use"), opened(tmp_path / "out", SETTINGS):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with opened(tmp_path / "out", SETTINGS):
        pass


def test_folder_of_other_origin_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("kept")
    with pytest.raises(UserError, match="no unfinished run"), opened(tmp_path / "out", SETTINGS):
        pass
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "kept"


def test_newest_complete_checkpoint_counts_and_newer_ruins_are_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 90)
    save(tmp_path, 100)
    save(tmp_path, 110, complete=False)
    found = last_complete(tmp_path)
    assert found == (tmp_path / "checkpoint-100", {"seconds": 100.0})
    discard_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-90"]


def test_checkpoint_whose_file_was_cut_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"weigh")
    (save(tmp_path, 3) / "model.safetensors").unlink()
    found = last_complete(tmp_path)
    assert found is not None
    assert found[0].name == "checkpoint-1"


def test_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1, complete=False)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "disk failed")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk failed"):
        mark_complete(folder, {})
    assert last_complete(tmp_path) is None
    monkeypatch.undo()
    mark_complete(folder, {})
    assert json.loads((folder / "complete.json").read_text())["files"] == {"model.safetensors": 7}
