"""Requests made up from our own OpenAPI document: whatever comes, no answer is a failure of the server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import KEYS
from tests.e2e.servers import Server

SCHEMATHESIS = shutil.which("schemathesis", path=str(Path(sys.executable).parent))

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(SCHEMATHESIS is None, reason="schemathesis is installed by `make test-clients`"),
]


def test_no_request_makes_the_server_fail(guarded: Server, tmp_path: Path) -> None:
    # One worker: Python 3.11.7 fails when several threads parse at once, as hypothesis does ("AST constructor recursion depth
    # mismatch", CPython issue 106905).
    command = [
        SCHEMATHESIS,
        "run",
        guarded.url + "/openapi.json",
        "--header",
        f"Authorization: Bearer {KEYS['alice']}",
        *("--checks", "not_a_server_error", "--max-examples", "300", "--seed", "1", "--no-color"),
        *(
            "--request-timeout",
            "120",
            "--suppress-health-check",
            "all",
            "--generation-database",
            "none",
        ),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    cases = int(re.search(r"(\d+) generated", done.stdout).group(1))
    assert cases >= 2000
    assert guarded.total("sparse_engine_restarts_total") == 0
    failures = [
        dict(labels)
        for (name, labels), value in guarded.metrics().items()
        if name == "sparse_http_requests_total" and value and dict(labels)["status"] >= "500"
    ]
    # While the server was starting its readiness said so.
    assert {failure["path"] for failure in failures} <= {"/readyz"}
