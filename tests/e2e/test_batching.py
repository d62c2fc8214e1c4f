"""`prosparse bench batching` as a user runs it: two policies on the demo, each with a server of its own."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import DEMO
from tests.e2e.servers import PROSPARSE

pytestmark = pytest.mark.engine


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROSPARSE), "bench", "batching", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)


def test_two_policies_replay_the_same_requests(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = [
        "--trace",
        "mix",
        "--load",
        "1",
        "--rate",
        "4",
        "--seconds",
        "8",
        "--itl-slo-ms",
        "500",
        "--ttft-slo-ms",
        "20000",
    ]
    done = bench(
        "--model", str(DEMO), *arguments, "--json", str(file), "--logs", str(tmp_path), "--", "--enforce-eager"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    fcfs, sparse = report["replays"]
    assert [fcfs["policy"], sparse["policy"]] == ["fcfs", "sparse"]
    for replay in (fcfs, sparse):
        summary = replay["summary"]
        assert (summary["rejected"], summary["failed"]) == (0, 0)
        assert summary["all"]["requests"] == 32
        assert summary["all"]["good"] > 0.5
        assert summary["classes"].keys() == {"chat", "qa", "long-text"}
        assert replay["cost_error"].keys() <= {"sparse", "dense"}
        assert replay["fallbacks"] == {}
    counts = [
        {name: times["requests"] for name, times in replay["summary"]["classes"].items()} for replay in (fcfs, sparse)
    ]
    assert counts[0] == counts[1]
    assert fcfs["decisions"] == {}
    assert sparse["decisions"]["admit"] == 32
    assert "goodput" in done.stdout
