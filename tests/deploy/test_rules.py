"""Rules are valid, each alert has a test and a chapter in the runbook."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.prometheus import CONFIGURATION, MISSING, program

RUNBOOK = CONFIGURATION.parents[1] / "docs" / "runbook.md"
TESTS = sorted((Path(__file__).parent / "rules").glob("*.yml"))
ALERTS = {
    rule["alert"]: rule
    for path in (CONFIGURATION / "rules").glob("*.yml")
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def promtool(*arguments: str) -> None:
    if program("promtool") is None:
        pytest.skip(MISSING.format("promtool"))
    done = subprocess.run([str(program("promtool")), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid():
    promtool("check", "config", str(CONFIGURATION / "prometheus.yml"))


def test_the_rules_pass_lint():
    promtool("check", "rules", "--lint-fatal", *map(str, (CONFIGURATION / "rules").glob("*.yml")))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_rules(path):
    promtool("test", "rules", str(path))


def test_every_alert_is_tested_firing():
    cases = [
        case for path in TESTS for test in yaml.safe_load(path.read_text())["tests"] for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == ALERTS.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(name):
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_the_runbook_has_a_chapter_for_each_alert_and_no_other():
    chapters = re.findall(r"^### (ProSparse\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(chapters) == sorted(ALERTS)
