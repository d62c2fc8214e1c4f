"""The work folder of an unfinished run, ``OUT.partial``: enough to go on after the process was killed at any moment.

    run.json           the settings the run was started with
    phases/NAME.json   what a finished phase found
    trainer/           the Trainer's checkpoints; one counts once its ``complete.json`` is there
    checkpoint/        what becomes OUT

Every file that says "this is finished" is written last and appears whole or not at all.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from sparse_backend.errors import UserError

BASE_PHASE = "base"
"""What was measured before training: seconds of work."""

_MARKER = "complete.json"
_CHECKPOINT_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Workspace:
    """An unfinished run's folder, held by this process (or by the first of several that compute together)."""

    folder: Path
    out: Path
    is_writer: bool = True
    """False in all but the first of several processes."""

    @property
    def trainer(self) -> Path:
        """The Trainer's own folder."""
        return self.folder / "trainer"

    @property
    def checkpoint(self) -> Path:
        """What becomes OUT; created where missing."""
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        return folder

    def below(self, name: str) -> "Workspace":
        """A work folder of the same kind inside this one, for one of several runs."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return Workspace(folder, self.out, self.is_writer)

    def result(self, phase: str) -> dict[str, Any] | None:
        """What a finished phase recorded; None for one that has not finished."""
        path = self._phase(phase)
        return json.loads(path.read_text()) if path.is_file() else None

    def record(self, phase: str, result: Mapping[str, Any]) -> None:
        """Mark a phase as finished."""
        if self.is_writer:
            self._phase(phase).parent.mkdir(exist_ok=True)
            write_json(self._phase(phase), result)

    def finish(self) -> None:
        """Let what is in ``checkpoint`` become OUT, and delete everything else."""
        self.checkpoint.rename(self.out)
        rmtree(self.folder, ignore_errors=True)

    def _phase(self, phase: str) -> Path:
        return self.folder / "phases" / f"{phase}.json"

    def holds_work(self) -> bool:
        """True where something would be lost with the folder: the Trainer's checkpoints, a finished phase, or an export."""
        return (
            any(self.folder.rglob(f"{_CHECKPOINT_PREFIX}*/{_MARKER}"))
            or any(path.stem != BASE_PHASE for path in (self.folder / "phases").glob("*.json"))
            or any((self.folder / "checkpoint").glob("*.safetensors"))
        )


def check_absent(out: Path) -> None:
    """Refuse an output folder that is there, before anything is read that takes minutes.

    Raises:
        UserError: it exists.
    """
    if out.is_symlink() or out.exists():
        raise UserError(
            f"OUT {str(out)!r} exists already. Nothing is overwritten: name another folder, or delete this one first."
        )


@contextmanager
def opened(out: Path, settings: Mapping[str, Any], *, is_writer: bool = True) -> Iterator[Workspace]:
    """The work folder of the run that makes ``out``, new or as an earlier process left it.

    When the block fails, the folder stays if work would be lost with it; the same command then goes on from there. It ends with
    ``Workspace.finish``.

    Args:
        out: the folder to create.
        settings: everything that decides what the run computes; an unfinished run is only gone on with if it is equal.
        is_writer: False in all but the first of several processes, which leave all writing to the first.

    Raises:
        UserError: ``out`` exists; its work folder is of another run, in use, or cannot be created or completed.
    """
    partial = out.with_name(out.name + ".partial") if out.name else out
    try:
        check_absent(out)
        if not is_writer:
            yield Workspace(partial, out, is_writer=False)
            return
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUT {str(out)!r} cannot be created: {error}.") from None
    with _locked(partial):
        _check_settings(partial, settings)
        workspace = Workspace(partial, out)
        try:
            yield workspace
        except BaseException as error:
            if not workspace.holds_work():
                rmtree(partial, ignore_errors=True)
                raise
            kept = f"What was done is kept in {str(partial)!r}: the same command goes on from there."
            if isinstance(error, UserError | OSError):
                raise UserError(
                    f"OUT {str(out)!r} could not be completed: {str(error).removesuffix('.')}. {kept}"
                ) from None
            error.add_note(kept)
            raise


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    # The kernel lets go of the lock when its holder dies, however it dies.
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{str(partial)!r} is in use: another process is writing OUT. Wait for it, or name another folder."
            ) from None
        yield
    finally:
        os.close(descriptor)


def _check_settings(partial: Path, settings: Mapping[str, Any]) -> None:
    path = partial / "run.json"
    wanted = dict(_flattened(settings))
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"{str(partial)!r} holds an unfinished run with other settings: {name} is {found.get(name)} there,"
                f" {wanted.get(name)} here. Give the same to go on with it, or delete the folder to start anew."
            )
    elif any(partial.iterdir()):
        raise UserError(f"{str(partial)!r} exists and is no unfinished run of this command. Move or delete it.")
    else:
        write_json(path, wanted)


def _flattened(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping | list | tuple):
        pairs = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
        for key, value in pairs:
            yield from _flattened(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, settings


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def mark_complete(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Declare one of the Trainer's checkpoints finished, with what our part needs in order to go on from it."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    write_json(checkpoint / _MARKER, {"files": files, "state": state})


def checkpoint_folder(trainer: Path, step: int) -> Path:
    """Where the Trainer saves step ``step``."""
    return trainer / f"{_CHECKPOINT_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def last_complete(trainer: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest finished checkpoint below the Trainer's folder and the state saved with it; None if there is none."""
    for path in _newest_first(trainer):
        try:
            marker = json.loads((path / _MARKER).read_text())
            if all((path / name).stat().st_size == size for name, size in marker["files"].items()):
                return path, marker["state"]
        except FileNotFoundError:
            continue
    return None


def discard_incomplete(trainer: Path) -> None:
    """Delete what a killed process left half written, which the Trainer would count among its checkpoints."""
    kept = last_complete(trainer)
    for path in _newest_first(trainer):
        if kept is not None and path == kept[0]:
            return
        rmtree(path)


def _newest_first(trainer: Path) -> list[Path]:
    return sorted(trainer.glob(f"{_CHECKPOINT_PREFIX}*"), key=step_of, reverse=True)
