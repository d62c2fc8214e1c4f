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


BREAKS_OFF = 7
LATE = 8
PADDING = "x" * 300  # an event of a real server is about as long


async def app(scope, receive, send) -> None:
    """Answers with max_tokens tokens, one every ``GAP_S``; by how the prompt begins:

    with 0, with 429; with ``BREAKS_OFF``, with an error after half of them; with ``LATE``, two tokens in an event.
    """
    body = json.loads((await receive())["body"])
    first, tokens = body["prompt"][0], body["max_tokens"]
    await send({"type": "http.response.start", "status": 429 if first == 0 else 200, "headers": []})

    async def event(data: dict[str, object]) -> None:
        # In two pieces, as a busy connection may deliver it.
        text = f"data: {json.dumps(data)}\n\n".encode()
        for piece in (text[:3], text[3:]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0.005)

    events = {0: 0, BREAKS_OFF: tokens // 2, LATE: tokens // 2}.get(first, tokens)
    for _ in range(events):
        await asyncio.sleep(GAP_S)
        await event({"choices": [{"text": PADDING}]})
    if first == BREAKS_OFF:
        await event({"error": {"message": "out of luck"}})
    elif first:
        assert body["stream_options"] == {"include_usage": True}
        await event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": tokens}})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if first else b""})


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


async def test_tokens_are_those_of_the_usage_and_a_broken_answer_is_none(url: str) -> None:
    prompts = [prompt(0, 1, 20), prompt(0, LATE, 20), prompt(0, BREAKS_OFF, 6)]
    each, late, broken = await Client([url], "m", OneServer()).replay(prompts)
    assert (each.tokens, len(each.itl_s)) == (20, 19)
    assert (late.tokens, len(late.itl_s), late.status) == (20, 9, 200)
    assert (broken.tokens, broken.ttft_s, broken.status) == (0, None, 0)


async def test_a_server_that_is_not_there_is_no_answer() -> None:
    (outcome,) = await Client(["http://127.0.0.1:9"], "m", OneServer()).replay([prompt(0, 1, 1)])
    assert outcome.status == 0


async def test_saturation_keeps_so_many_going_and_leaves_out_what_is_cut_off(url: str) -> None:
    prompts = [prompt(0, 1, 2), prompt(0, 0, 2)]
    outcomes = await Client([url], "m", OneServer()).saturate(prompts, 2, 1.0)
    good = [outcome for outcome in outcomes if outcome.status == 200]
    assert 2 <= len(good) <= 1.0 / (2 * GAP_S)
    assert 1 <= len(outcomes) - len(good) <= 6
