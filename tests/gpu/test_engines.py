"""How the tests of vLLM run their engines, with other programs in place of engines: this needs no GPU."""

import contextlib
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu import engines
from tests.gpu.engines import EngineConfig, EngineError, Engines, Round

ANSWER = (
    '{"rounds": [[{"tokens": [1], "top": [[-1, -2]], "cached": 0}]], "counted": [], "facts": {}, "under_load": [],'
    ' "snapshot": {}, "live_snapshot": {}, "ready_s": 1, "total_s": 2}'
)
PROGRAM = f"""
import json, os, subprocess, sys, time
environment = json.load(open(sys.argv[1]))["config"]["environment"]
if environment["DO"] == "die":
    print("WARNING: an ImportError: not the cause")
    print("Traceback (most recent call last):\\n  File …\\nKeyError: 'the cause'", flush=True)
    raise RuntimeError("another process died")
if environment["DO"] == "hang":
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)
    child.wait()
open(sys.argv[2], "w").write({ANSWER!r})
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "COMMAND", [sys.executable, "-c", PROGRAM])
    monkeypatch.setattr(engines, "AT_A_TIME", 3)


def start(folder: Path, *names: str) -> Engines:
    configs = {name: EngineConfig(environment={"DO": name}) for name in names}
    return Engines(folder, configs, [Round([[1]], 1)])


def child_of_the_hanging_one(folder: Path) -> psutil.Process:
    log = folder / "hang" / "log"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    return psutil.Process(int(log.read_text()))


def ended(process: psutil.Process) -> bool:
    # A killed process takes a moment to go. In a container it may stay as a zombie, for want of anybody who asks how it ended.
    deadline = time.monotonic() + 5
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return True


def test_an_engine_that_fails_says_why_at_once_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(tmp_path, "hang", "die", "answer") as some:
        with pytest.raises(EngineError, match=r"'die' failed, exit status 1 after \d s: KeyError: 'the cause'"):
            some.answer("die")
        assert some.answer("answer").rounds[0][0].tokens == [1]
        child = child_of_the_hanging_one(tmp_path)
    assert ended(child)
    assert "die: FAILED" in capsys.readouterr().out


def test_an_engine_that_hangs_is_shown_and_in_the_end_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "TIMEOUT_S", 2)
    monkeypatch.setattr(engines, "WORD_EVERY_S", 0.5)
    with start(tmp_path, "hang") as some:
        child = child_of_the_hanging_one(tmp_path)
        with pytest.raises(EngineError, match="too slow, killed after 2 s"):
            some.answer("hang")
        assert ended(child)
    assert f"hang: {child.pid}" in capsys.readouterr().out
