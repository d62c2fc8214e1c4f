import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from server.admission import Admission
from server.app import api_app, inner_chain, operations_app, operations_routers, outer_chain
from server.auth import KeyRing
from server.batching import BatchingTelemetry
from server.health import FrontDoor, Health
from server.metrics import ServerMetrics
from server.paths import DOCUMENTATION_PATHS
from server.policy import RequestPolicy
from server.rates import KeyRates
from server.settings import Settings
from server.telemetry import SparsityTelemetry


class Engine:
    died = False

    def stalled(self) -> float:
        return 0.0


def build(*keys: str, **flags) -> httpx.AsyncClient:
    """A ready server without an engine: operations, a foreign registry, and an API with no routes of its own."""
    settings = Settings.load({"model": "m", **flags})
    foreign = CollectorRegistry()
    Gauge("vllm:running", "Of another registry.", registry=foreign).set(3)
    telemetry = SparsityTelemetry([0.5])
    health = Health(settings.stall_timeout)
    admission = Admission(settings)
    metrics = ServerMetrics(health, admission)
    operations = operations_routers(health, telemetry, [lambda: metrics.registry, lambda: foreign])
    door = FrontDoor(health, operations_app(operations))
    policy = RequestPolicy(settings, 512)
    door.api = inner_chain(api_app(operations), settings, policy, KeyRates(settings), admission, metrics)
    health.ready(Engine())
    chain = outer_chain(door, settings, KeyRing(keys), metrics, BatchingTelemetry("fcfs"), lambda line: None)
    return httpx.AsyncClient(transport=httpx.ASGITransport(chain), base_url="http://server")


async def test_metrics_show_ours_and_those_of_other_registries():
    async with build() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'sparse_ffn_expected_density{layer="0"} 0.5' in response.text
    assert "sparse_ready 1.0" in response.text
    assert "vllm:running 3.0" in response.text


async def test_the_openapi_page_documents_probes_and_metrics():
    async with build() as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/livez", "/readyz", "/health", "/metrics"} <= set(paths)


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/v1/models",
        *DOCUMENTATION_PATHS,
        "/unknown",
        "/livez/",
        "/metrics/",
        "/static/x",
        "/page/",
        "/page/x.js",
    ],
)
async def test_with_keys_everything_but_the_probes_needs_one(path):
    async with build("k") as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={"Authorization": "Bearer k"})).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_with_keys_the_probes_answer_everybody(path):
    async with build("k") as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/unknown", "/metrics", "/v1/models"])
async def test_every_answer_has_the_requests_id(path):
    async with build("k") as client:
        assert (await client.get(path, headers={"X-Request-Id": "mine"})).headers["x-request-id"] == "mine"


PREFLIGHT = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}


async def test_browsers_of_other_origins_are_not_let_in_by_default():
    async with build("k") as client:
        answer = await client.options("/v1/completions", headers=PREFLIGHT)
        assert answer.status_code == 401
        plain = await client.get("/readyz", headers=PREFLIGHT)
    assert not [name for name in (*answer.headers, *plain.headers) if name.startswith("access-control")]


async def test_origins_can_be_let_in():
    async with build("k", cors_origins="https://ui.example, https://other.example") as client:
        answer = await client.options("/v1/completions", headers=PREFLIGHT)
        assert answer.headers["access-control-allow-origin"] == "https://ui.example"
        refused = await client.options("/v1/completions", headers={**PREFLIGHT, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        # What a page may call still needs a key.
        assert (await client.get("/v1/models", headers=PREFLIGHT)).status_code == 401
