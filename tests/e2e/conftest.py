from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.servers import Server

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that end the shared server go last, whatever the order of files."""
    items.sort(key=lambda item: item.path.name == "test_shutdown.py")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo checkpoint, served; one server for all end-to-end tests, since a start takes half a minute."""
    # On a busy machine a pause says nothing of the engine's health.
    patience = ("--restart-timeout", "120")
    server = Server(DEMO, tmp_path_factory.mktemp("server") / "log", *patience, "--", "--max-num-seqs", "256")
    try:
        server.wait_listening()
        server.while_loading = server.get("/v1/models")
        server.wait_ready()
        yield server
    finally:
        server.close()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


# Sequences that run at once, and requests that wait.
RUNNING = 12
QUEUE = ("--max-running", str(RUNNING), "--queue-requests", str(2 * RUNNING))

KEYS = {"alice": "alice-secret", "bob": "bob-secret"}
FLAGS = (*QUEUE, "--restart-timeout", "10", "--max-restarts", "100")
VLLM_FLAGS = ("--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo checkpoint behind keys, for tests that attack it; it calls itself alice."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    server = Server(DEMO, folder / "log", "--api-key-file", str(keys), *FLAGS, "--", *VLLM_FLAGS, key=KEYS["alice"])
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()
