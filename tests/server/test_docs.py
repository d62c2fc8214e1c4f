"""docs/serving.md names what there is, no more and no less."""

import re
from pathlib import Path

from server.admission import Admission
from server.health import Health
from server.limits import AdmissionLimits
from server.metrics import ServerMetrics
from server.settings import Settings
from server.telemetry import SparsityTelemetry
from tests.server.test_telemetry import snapshot

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"

# What the sample of a family is called, where it is not called like the family.
SUFFIXES = {"counter": "_total", "info": "_info"}


def first_column(heading: str) -> list[str]:
    """Every name in backticks in the first column of the table under a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall("`(.+?)`", cell)]


def test_the_settings_table_lists_the_settings():
    assert sorted(first_column("Settings")) == sorted(Settings.model_fields)


async def test_the_metric_table_lists_the_metrics():
    async def ask():
        return snapshot(1, 1, 1, 1)

    telemetry = SparsityTelemetry()
    await telemetry.start(ask)
    own = ServerMetrics(Health(1), Admission(AdmissionLimits())).registry
    families = [*telemetry.collect(), *own.collect()]
    shown = [family.name + SUFFIXES.get(family.type, "") for family in families]
    assert sorted(first_column("Metrics")) == sorted(shown)
