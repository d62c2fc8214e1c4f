"""The client, against a small server that says when it sends what."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn

from sparse_backend.bench.replay import Client, OneServer, Prompt
from sparse_backend.bench.trace import TraceRequest

GAP_S = 0.05


async def app(scope, receive, send) -> None:
    """Answers a prompt that begins with 0 with 429, others with max_tokens tokens, one every ``GAP_S``."""
    body = json.loads((await receive())["body"])
    refused = body["prompt"][0] == 0
    await send({"type": "http.response.start", "status": 429 if refused else 200, "headers": []})
    for _ in range(0 if refused else body["max_tokens"]):
        await asyncio.sleep(GAP_S)
        # In two pieces, as a busy connection may deliver it.
        for piece in (b"dat", b'a: {"choices": []}\n\n'):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0.005)
    await send({"type": "http.response.body", "body": b"" if refused else b"data: [DONE]\n\n"})


@pytest.fixture
async def url() -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error", ws="none"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - a flag is all that uvicorn gives
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def prompt(at_s: float, first: int, tokens: int) -> Prompt:
    return Prompt(TraceRequest(at_s, "one", 2, tokens), [first, 1])


async def test_requests_are_sent_at_their_times_and_tokens_noted_as_they_come(url: str) -> None:
    outcomes = await Client([url], "m", OneServer()).replay([prompt(0.3, 1, 4), prompt(0.0, 1, 1), prompt(0.1, 0, 3)])
    first, single, refused = outcomes
    assert first.sent_s == pytest.approx(0.3, abs=0.2)
    assert (first.tokens, len(first.itl_s), first.status) == (4, 3, 200)
    assert first.ttft_s is not None
    assert first.ttft_s >= 0.9 * GAP_S
    assert sum(first.itl_s) >= 0.9 * 3 * GAP_S
    assert (single.tokens, single.itl_s) == (1, [])
    assert (refused.status, refused.ttft_s, refused.tokens) == (429, None, 0)


async def test_a_server_that_is_not_there_is_no_answer() -> None:
    (outcome,) = await Client(["http://127.0.0.1:9"], "m", OneServer()).replay([prompt(0, 1, 1)])
    assert outcome.status == 0


async def test_saturation_keeps_so_many_going_and_leaves_out_what_is_cut_off(url: str) -> None:
    prompts = [prompt(0, 1, 2), prompt(0, 0, 2)]
    outcomes = await Client([url], "m", OneServer()).saturate(prompts, 2, 1.0)
    good = [outcome for outcome in outcomes if outcome.status == 200]
    assert 2 <= len(good) <= 1.0 / (2 * GAP_S)
    assert 1 <= len(outcomes) - len(good) <= 6
