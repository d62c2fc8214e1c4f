"""Every command of README and docs is run as it stands, or says in a comment before it why it cannot be.

A block that is not run has ``<!-- not run: REASON -->`` on the line before it. All others are run against one server.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.settings import Settings
from tests.e2e.servers import PROSPARSE, Server

ROOT = Path(__file__).parents[2]
# docs/results are records of dated runs, whose commands stand in docs/benchmarks.md.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "demo" / "README.md"]
ADDRESS = "http://127.0.0.1:8000"
INTERPRETERS = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run; None if it is."""


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        content = page.read_text()
        for match in _BLOCK.finditer(content):
            line = content.count("\n", 0, match.start("text")) + 1
            text = match["text"].replace("\n" + match["indent"], "\n").removeprefix(match["indent"])
            found.append(Block(page, line, match["language"], text, match["reason"]))
    return found


COMMANDS = [block for block in blocks() if block.language in INTERPRETERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that looks like the repository's root; what commands write stays in it."""
    folder = tmp_path_factory.mktemp("docs")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs", "secrets", ".env"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.engine
@pytest.mark.parametrize(
    "block",
    [block for block in COMMANDS if block.reason is None],
    ids=lambda block: f"{block.page.name}:{block.line}",
)
def test_command(block: Block, server: Server, folder: Path) -> None:
    done = subprocess.run(
        [*INTERPRETERS[block.language], block.text.replace(ADDRESS, server.url)],
        cwd=folder,
        env={**os.environ, "PATH": f"{PROSPARSE.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout


def test_settings_files_are_ones(tmp_path: Path) -> None:
    (block,) = (block for block in blocks() if block.page.name == "operating.md" and block.language == "yaml")
    (tmp_path / "server.yaml").write_text(block.text)
    settings = Settings.load({"config": tmp_path / "server.yaml"})
    assert settings.vllm_flags == ("--max-num-seqs", "32")


def test_blocks_say_what_they_are() -> None:
    assert [f"{block.page.name}:{block.line}" for block in blocks() if not block.language] == []
    # Nor are there code blocks by mere indentation, which the expression above would not see.
    rest = {page.name: _BLOCK.sub("", page.read_text()) for page in PAGES}
    assert [name for name, text in rest.items() if re.search(r"^\n {4}\S", text, re.MULTILINE)] == []


def test_most_pages_have_a_command_that_is_run() -> None:
    """Or else the expression above finds no blocks any more."""
    assert {block.page.name for block in COMMANDS if block.reason is None} >= {
        "README.md",
        "quick-start.md",
        "tuning.md",
    }
    assert len(COMMANDS) > 20
