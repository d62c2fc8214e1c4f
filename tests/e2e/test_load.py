"""Short versions of `python -m tests.e2e.overload` and `… .soak`: all that does not depend on how fast this machine is."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e import overload, soak
from tests.e2e.conftest import DEMO
from tests.e2e.servers import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(DEMO, tmp_path_factory.mktemp("small") / "log", *overload.FLAGS, "--", "--enforce-eager")
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def test_overload(small: Server) -> None:
    found = overload.measure(small, 8, calm=4)
    over = found["overload"]
    assert over["refused"] > over["answered"] > 0
    assert over["neither"] == over["refused_without_retry_after"] == 0
    assert found["afterwards"]["answered"] > 0
    assert small.total("sparse_requests_admitted") == small.total("sparse_requests_queued") == 0
    assert small.total("sparse_requests_rejected_total", reason="queue_requests") == over["refused"]
    print(found)


def test_soak(small: Server) -> None:
    samples, counts = asyncio.run(soak.soak(small, 20, 2))
    assert {200, 400, None} <= counts.keys() <= {200, 400, 429, None}, counts
    small.wait_until(lambda: small.total("sparse_requests_admitted") == 0, 5, "empty")
    print(soak.growth(samples, 4), counts)
    assert max(soak.growth(samples, 4).values()) < 0.2
