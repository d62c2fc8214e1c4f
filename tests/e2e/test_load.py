"""Short versions of `python -m tests.e2e.overload` and `… .soak`: all that does not depend on how fast this machine is."""

import asyncio

import pytest

from tests.e2e import overload, soak
from tests.e2e.servers import Server

pytestmark = pytest.mark.engine


def test_overload(guarded: Server) -> None:
    guarded.wait_ready()
    before = guarded.total("sparse_requests_rejected_total", reason="queue_requests")
    found = overload.measure(guarded, 6, calm=3)
    over = found["overload"]
    assert over["refused"] > over["answered"] > 0
    assert over["neither"] == over["refused_without_retry_after"] == 0
    assert found["afterwards"]["answered"] > 0
    assert guarded.total("sparse_requests_admitted") == guarded.total("sparse_requests_queued") == 0
    rejected = guarded.total("sparse_requests_rejected_total", reason="queue_requests") - before
    assert rejected == over["refused"]


def test_soak(guarded: Server) -> None:
    guarded.wait_ready()
    samples, counts = asyncio.run(soak.soak(guarded, 12, 0.5))
    assert {200, 400} <= counts.keys() <= {200, 400, 429, None}, counts
    guarded.wait_until(lambda: guarded.total("sparse_requests_admitted") == 0, 5, "empty")
    assert max(soak.growth(samples, 6).values()) < 0.2
