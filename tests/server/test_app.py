import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from server.app import api_app, operations_app, operations_routers, with_keys
from server.health import FrontDoor, Health
from server.telemetry import SparsityTelemetry


class Engine:
    died = False


def build(keys: list[str]) -> httpx.AsyncClient:
    """A ready server without an engine: operations, a foreign registry, and an API with no routes of its own."""
    foreign = CollectorRegistry()
    Gauge("vllm:running", "Of another registry.", registry=foreign).set(3)
    telemetry = SparsityTelemetry([0.5])
    health = Health(telemetry.unanswered)
    operations = operations_routers(health, telemetry, [lambda: foreign])
    door = FrontDoor(health, operations_app(operations))
    door.api = api_app(operations)
    health.ready(Engine())
    return httpx.AsyncClient(transport=httpx.ASGITransport(with_keys(door, keys)), base_url="http://server")


async def test_metrics_show_ours_and_those_of_other_registries():
    async with build([]) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'sparse_checkpoint_density{layer="0"} 0.5' in response.text
    assert "vllm:running 3.0" in response.text


async def test_the_openapi_page_documents_probes_and_metrics():
    async with build([]) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/livez", "/readyz", "/health", "/metrics"} <= set(paths)


@pytest.mark.parametrize(
    "path", ["/metrics", "/openapi.json", "/v1/models", "/unknown", "/livez/", "/metrics/", "/page/", "/page/absent.js"]
)
async def test_with_keys_everything_but_the_probes_needs_one(path):
    async with build(["k"]) as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={"Authorization": "Bearer k"})).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_with_keys_the_probes_answer_everybody(path):
    async with build(["k"]) as client:
        assert (await client.get(path)).status_code == 200
