"""docs/serving.md names the settings there are, no more and no less."""

import re
from pathlib import Path

from server.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def first_column(heading: str) -> list[str]:
    """Every name in backticks in the first column of the table under a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall("`(.+?)`", cell)]


def test_the_settings_table_lists_the_settings():
    assert sorted(first_column("Settings")) == sorted(Settings.model_fields)
