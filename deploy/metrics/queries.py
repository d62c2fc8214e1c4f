"""Every PromQL expression that is shipped: those of the dashboards, and of the recording and alert rules."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DASHBOARDS = Path(__file__).parents[1] / "grafana" / "dashboards"
RULES = Path(__file__).parents[1] / "prometheus" / "rules"


@dataclass(frozen=True)
class Expression:
    """One expression and where it stands."""

    place: str
    """Board and panel, or the rule's name."""
    text: str
    """PromQL, without Grafana's variables."""
    kind: str
    """"panel", "annotation", "record" or "alert"."""


def boards() -> list[dict[str, Any]]:
    """The dashboards as Grafana reads them."""
    return [json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))]


def dashboard_expressions() -> Iterator[Expression]:
    """Of every query of every panel, and of the annotations."""
    for board in boards():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield Expression(f"{board['title']}: {panel['title']}", without_variables(target["expr"]), "panel")
        for annotation in board["annotations"]["list"]:
            yield Expression(
                f"{board['title']}: {annotation['name']}", without_variables(annotation["expr"]), "annotation"
            )


def rule_expressions() -> Iterator[Expression]:
    """Of every rule."""
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                kind = "alert" if "alert" in rule else "record"
                yield Expression(rule[kind], rule["expr"], kind)


def without_variables(expression: str, *, rate: str = "1m", time_range: str = "5m") -> str:
    """A dashboard's expression as any Prometheus takes it: every server chosen, and Grafana's two ranges as given."""
    values = {"job": ".+", "instance": ".+", "__rate_interval": rate, "__range": time_range}
    for variable, value in values.items():
        expression = re.sub(rf"\${variable}\b", value, expression)
    return expression


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Every selector of series in an expression.

    Raises:
        ValueError: it is no PromQL.
    """
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def metrics(expression: str) -> set[str]:
    """The names of the series that an expression reads."""
    return {str(selector.name) for selector in selectors(expression)}
