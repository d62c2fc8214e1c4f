"""Write docs/metrics.md, the reference of all metrics: ``python -m deploy.metrics.reference``."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import Metric

from deploy.metrics.exported import labels, ours, series, vllms
from deploy.metrics.queries import dashboard_expressions, metrics, rule_expressions

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

_INTRODUCTION = """\
# Metrics

What `/metrics` shows, generated from the code by `python -m deploy.metrics.reference`. Durations are in seconds, sizes in
bytes, shares between 0 and 1; a name that ends in `_total` only grows while the server runs. The last column says where a
metric is shown or watched: the [dashboards](../deploy/grafana/dashboards) Service, Sparsity and Fleet, and the alerts of the
[runbook](runbook.md).
"""

_VLLM = """
## vLLM's

As vLLM 0.32 describes them, for the demo checkpoint and the default flags: flags of vLLM bring further ones. All have the labels
`model_name` and `engine` unless others are named.
"""


def page() -> str:
    """The text of docs/metrics.md."""
    uses = _uses()
    own = asyncio.run(ours())
    lines = [_INTRODUCTION, "\n## Ours\n\n", *_table(own, uses, common=set()), _VLLM, "\n"]
    lines += _table(vllms(), uses, common={"engine", "model_name"})
    return "".join(lines)


def _table(families: Iterable[Metric], uses: dict[str, set[str]], common: set[str]) -> Iterator[str]:
    yield "| name | type | labels | | shown in |\n|---|---|---|---|---|\n"
    for family in sorted(families, key=lambda family: family.name):
        names = series(family)
        name = names[0] if len(names) == 1 else family.name
        own_labels = ", ".join(label for label in labels(family) if label not in common)
        shown = ", ".join(sorted(set().union(*(uses[name] for name in names))))
        yield f"| `{name}` | {family.type} | {own_labels} | {family.documentation} | {shown} |\n"


def _uses() -> dict[str, set[str]]:
    """Boards, and "alerts", by the metrics that they read; recorded series are followed to what they are recorded from."""
    recorded = {rule.place: metrics(rule.text) for rule in rule_expressions() if rule.kind == "record"}
    uses: defaultdict[str, set[str]] = defaultdict(set)
    for expression in (*dashboard_expressions(), *rule_expressions()):
        if expression.kind == "record":
            continue
        where = "alerts" if expression.kind == "alert" else expression.place.split(": ")[0].removeprefix("ProSparse / ")
        for name in metrics(expression.text):
            for source in recorded.get(name, {name}):
                uses[source].add(where)
    return uses


if __name__ == "__main__":
    PAGE.write_text(page())
