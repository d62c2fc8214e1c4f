"""Running the room's commands as ``python -m`` would: within this process, or as one that can be killed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparse_backend.prosparse.command import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class World:
    """A corpus, and a dense base trained on it."""

    corpus: Path
    base: Path


def command(module: object, *arguments: object) -> int:
    """Run a command in this process; returns its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["module.py", *map(str, arguments)])
        return main(module.NAME, module.DESCRIPTION, module.add_arguments, module.run)  # type: ignore[attr-defined]


def start(module: str, *arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    """Start a command as a process of its own, or as several under torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", f"sparse_backend.prosparse.{module}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )


def history(out: Path) -> list[dict[str, float]]:
    """The log of a finished run's training."""
    return [json.loads(line) for line in (out / "report" / "training.jsonl").read_text().splitlines()]
