"""The official Node client, unmodified."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import KEYS
from tests.e2e.servers import Server

FOLDER = Path(__file__).with_name("node")
STEPS = ["models", "chat", "stream", "leaving", "tools", "jsonSchema", "completions", "errors"]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        shutil.which("node") is None or not (FOLDER / "node_modules").is_dir(),
        reason="needs node, and its openai package by `make test-clients`",
    ),
]


def test_conversation(guarded: Server) -> None:
    command = ["node", "conversation.js", guarded.url + "/v1", KEYS["alice"]]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, STEPS), done.stderr
