"""`prosparse bench batching` as a user runs it: two policies on the demo, each with a server of its own."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import DEMO
from tests.e2e.servers import PROSPARSE

pytestmark = pytest.mark.engine


# Seconds on a busy two-core machine: two servers are started, one after the other.
LIMIT = 570


def bench(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and messages of the command."""
    command = [str(PROSPARSE), "bench", "batching", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, messages = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            # Its servers, too.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output, messages


def test_two_policies_replay_the_same_requests(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = ["--trace", "mix", "--load", "1", "--rate", "4", "--seconds", "8"]
    # Such as a busy machine keeps, too: what is tested is not how fast it is.
    arguments += ["--itl-slo-ms", "2000", "--ttft-slo-ms", "60000"]
    status, output, messages = bench(
        "--model", str(DEMO), *arguments, "--json", str(file), "--logs", str(tmp_path), "--", "--enforce-eager"
    )
    assert status == 0, messages
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
    assert "goodput" in output
