"""A real Prometheus scrapes the real server under load, and every query that is shipped finds something."""

import math
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from deploy.grafana import mockup
from deploy.metrics.queries import boards, dashboard_expressions, rule_expressions, selectors
from tests.deploy.prometheus import MISSING, Prometheus, program
from tests.e2e.servers import Server

pytestmark = pytest.mark.skipif(not program("prometheus"), reason=MISSING.format("prometheus"))

# Seconds of load: several of the scrapes that the densities are taken between.
LOAD = 20

# Seconds that are looked back, on however slow a machine.
SEEN = 300

_NO_ALERT = "nothing is wrong"

# What finds nothing while all is well, with the reason. A panel by its place, a selector of a rule as PromQL.
EMPTY_AT_REST = {
    "ProSparse / Service: Alerts": _NO_ALERT,
    "ProSparse / Sparsity: Alerts": _NO_ALERT,
    "ProSparse / Fleet: Alerts": _NO_ALERT,
    "ProSparse / Service: Rejections by reason": "no request was refused",
    "ProSparse / Sparsity: Decisions": "the server batches first come, first served, which leaves nothing to decide",
    "ProSparse / Sparsity: Fallbacks to first come, first served": "the scheduler did not fall back",
    'sparse_http_requests_total{path=~"/v1/.*",status=~"5.."}': "no request failed",
    'sparse_kernel_info{reason!=""}': "there is a sparse path",
    "instance:sparse_ffn_drifted_layers:count15m": "no layer is off its density",
    "sparse_scheduler_fallbacks_total": "the scheduler did not fall back",
}


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After ``LOAD`` seconds of it."""
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://"))
    try:
        prometheus.wait_scraped()
        put_load(server, LOAD)
        yield prometheus
    finally:
        prometheus.close()


def put_load(server: Server, seconds: float) -> None:
    """Requests one after the other, from three clients: prompts long and short, answers streamed and not."""
    stop = time.monotonic() + seconds
    (model,) = (entry["id"] for entry in server.get("/v1/models").json()["data"])

    def ask(client: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while time.monotonic() < stop:
                body = {
                    "model": model,
                    "prompt": "import os\n" * 40 * client + "def ",
                    "max_tokens": 48,
                    "stream": client > 1,
                }
                assert http.post("/v1/completions", json=body).status_code == 200
                assert http.post("/v1/completions", json={"model": "no such"}).status_code in (400, 404)

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def finds(series: list[dict]) -> bool:
    values = [value for entry in series for _, value in entry.get("values", [entry.get("value")])]
    return any(not math.isnan(float(value)) for value in values)


@pytest.mark.parametrize("expression", dashboard_expressions(), ids=lambda expression: expression.place)
def test_every_panel_shows_something(prometheus, expression):
    found = prometheus.query_range(expression.text, SEEN, step=2)
    assert finds(found) or expression.place in EMPTY_AT_REST


@pytest.mark.parametrize("rule", rule_expressions(), ids=lambda rule: rule.place)
def test_every_series_that_a_rule_reads_is_there(prometheus, rule):
    missing = [
        text
        for selector in selectors(rule.text)
        if (text := selector.prettify()) not in EMPTY_AT_REST
        and not finds(prometheus.query(f"last_over_time({text}[{SEEN}s])"))
    ]
    assert missing == []


def test_the_documentations_picture_can_be_drawn(prometheus):
    (board,) = (board for board in boards() if board["uid"] == "prosparse-sparsity")
    figure = mockup.draw(board, mockup.Source(prometheus.url, SEEN / 60))
    shown = [text.get_text() for text in figure.texts]
    assert {panel["title"] for panel in board["panels"]} <= set(shown)
    assert shown[shown.index("Sparse path") + 1].endswith(" %")
    assert len([axes for axes in figure.axes if axes.has_data()]) > len(board["panels"]) / 2


def test_the_table_of_what_is_empty_names_what_there_is():
    places = {expression.place for expression in dashboard_expressions()}
    read = {selector.prettify() for rule in rule_expressions() for selector in selectors(rule.text)}
    assert EMPTY_AT_REST.keys() <= places | read


def test_prometheus_evaluates_every_rule(prometheus):
    rules = prometheus.rules()
    assert len(rules) == len(list(rule_expressions()))
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.skipif(not program("promtool"), reason=MISSING.format("promtool"))
def test_promtool_has_nothing_to_say_about_our_metrics(server):
    """vLLM's names have colons, which promtool knows for recording rules only."""
    scrape = server.get("/metrics").content
    checked = subprocess.run([str(program("promtool")), "check", "metrics"], input=scrape, capture_output=True)
    lines = (checked.stdout + checked.stderr).decode().splitlines()
    assert [line for line in lines if not line.startswith("vllm:")] == []
