"""From raw request to admitted one, with stand-ins for vLLM's routes."""

import asyncio
import json

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from server.admission import Admission
from server.health import Health
from server.intake import Intake
from server.limits import AdmissionLimits, RequestLimits
from server.metrics import ServerMetrics
from server.paths import CHAT_PATH, COMPLETIONS_PATH, TOKENIZE_PATH
from server.policy import RequestPolicy
from server.rates import KeyRates
from server.record import RequestRecord, current_request
from tests.server.asgi import Connection

BODY = {"prompt": "hello", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


class World:
    """An intake before routes that answer when a test lets them."""

    def __init__(self, **limits) -> None:
        requests = RequestLimits(
            **{name: value for name, value in limits.items() if name in RequestLimits.model_fields}
        )
        queue = AdmissionLimits(
            **{name: value for name, value in limits.items() if name in AdmissionLimits.model_fields}
        )
        self.entered, self.release, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.bodies: list[object] = []
        self.admission = Admission(queue)
        self.metrics = ServerMetrics(Health(1), self.admission)
        policy = RequestPolicy(requests, 512)
        self.app = Intake(self.routes(), requests, policy, KeyRates(queue), self.admission, self.metrics)
        self.record: RequestRecord | None = None

    def routes(self) -> FastAPI:
        app = FastAPI()

        @app.post(COMPLETIONS_PATH)
        async def completions(request: Request):
            self.bodies.append(await request.json())
            self.entered.set()
            await self.until_released(request)
            return {"done": True}

        @app.post(CHAT_PATH)
        async def chat(request: Request):
            async def events():
                try:
                    yield "data: 1\n\n"
                    self.entered.set()
                    await self.release.wait()
                    yield "data: [DONE]\n\n"
                finally:
                    self.ended.set()

            return StreamingResponse(events(), media_type="text/event-stream")

        @app.post(TOKENIZE_PATH)
        async def tokenize():
            return {"tokens": []}

        return app

    async def until_released(self, request: Request) -> None:
        """As vLLM's routes: ends early where the client is gone."""
        released = asyncio.ensure_future(self.release.wait())
        gone = asyncio.ensure_future(request.receive())
        await asyncio.wait({released, gone}, return_when=asyncio.FIRST_COMPLETED)
        released.cancel()
        gone.cancel()
        self.ended.set()

    def ask(self, connection: Connection, key: str | None = None) -> asyncio.Task:
        async def run():
            self.record = RequestRecord("id", "POST", connection.scope["path"], key=key)
            current_request.set(self.record)
            return await connection.ask(self.app)

        return asyncio.create_task(run())

    def count(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("sparse_requests_rejected_total", {"reason": reason})


async def test_the_app_gets_what_was_checked_and_the_client_its_answer():
    world = World()
    world.release.set()
    answer = await world.ask(Connection(COMPLETIONS_PATH, {**BODY, "store": True}))
    assert (answer.status, json.loads(answer.body)) == (200, {"done": True})
    assert world.bodies == [BODY]
    assert world.admission.running_requests == 0


@pytest.mark.parametrize(
    ("connection", "status", "reason"),
    [
        (Connection(COMPLETIONS_PATH, {**BODY, "n": 100}), 400, "policy"),
        (Connection(COMPLETIONS_PATH, b"x" * 101), 413, "body_bytes"),
        (Connection(COMPLETIONS_PATH, BODY, headers=((b"content-length", b"101"),)), 413, "body_bytes"),
        (Connection(COMPLETIONS_PATH, BODY, headers=((b"content-length", b"9" * 5000),)), 413, "body_bytes"),
        (Connection(COMPLETIONS_PATH, BODY, headers=((b"content-type", b"text/plain"),)), 400, "policy"),
    ],
)
async def test_what_is_refused(connection, status, reason):
    world = World(max_body_bytes=100)
    answer = await world.ask(connection)
    assert (answer.status, answer.error["code"]) == (status, status)
    assert world.count(reason) == 1
    assert world.bodies == []
    assert world.admission.running_requests == 0


async def test_a_body_that_does_not_come_is_408():
    world = World(header_timeout=0.01)
    connection = Connection(COMPLETIONS_PATH)
    connection.incoming = asyncio.Queue()
    connection.incoming.put_nowait({"type": "http.request", "body": b'{"prompt', "more_body": True})
    assert (await world.ask(connection)).status == 408


async def test_a_full_queue_is_told_before_the_body_is_read():
    world = World(max_running=1, queue_requests=1)
    running, waiting = Connection(COMPLETIONS_PATH, BODY), Connection(COMPLETIONS_PATH, BODY)
    first = world.ask(running)
    await world.entered.wait()
    second = world.ask(waiting)
    await asyncio.sleep(0.01)
    third = Connection(COMPLETIONS_PATH)
    third.incoming = asyncio.Queue()
    answer = await asyncio.wait_for(world.ask(third), 1)
    assert (answer.status, answer.error["type"]) == (429, "TooManyRequestsError")
    assert int(answer.headers[b"retry-after"]) >= 1
    assert world.count("queue_requests") == 1
    world.release.set()
    assert [(await task).status for task in (first, second)] == [200, 200]


async def test_tokenizing_waits_for_nobody():
    world = World(max_running=1, queue_requests=0)
    first = world.ask(Connection(COMPLETIONS_PATH, BODY))
    await world.entered.wait()
    assert (await world.ask(Connection(TOKENIZE_PATH, {"prompt": "x"}))).status == 200
    world.release.set()
    await first


async def test_a_key_that_used_up_its_rate():
    world = World(key_requests_per_minute=1)
    world.release.set()
    statuses = [(await world.ask(Connection(COMPLETIONS_PATH, BODY), key)).status for key in ("a", "a", "b")]
    assert statuses == [200, 429, 200]
    assert world.count("key_rate") == 1


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS_PATH, BODY), (CHAT_PATH, CHAT)])
async def test_a_client_that_goes_away_ends_its_request(path, body):
    world = World()
    connection = Connection(path, body)
    task = world.ask(connection)
    await world.entered.wait()
    connection.close()
    await asyncio.wait_for(task, 1)
    assert world.ended.is_set()
    assert world.record.status == 499
    assert world.admission.running_requests == 0


async def test_a_client_that_goes_away_leaves_the_queue():
    world = World(max_running=1)
    first = world.ask(Connection(COMPLETIONS_PATH, BODY))
    await world.entered.wait()
    connection = Connection(COMPLETIONS_PATH, BODY)
    second = world.ask(connection)
    await asyncio.sleep(0.01)
    connection.close()
    await asyncio.wait_for(second, 1)
    assert (world.record.status, world.admission.queued_requests, connection.answer.messages) == (499, 0, [])
    world.release.set()
    await first
    assert len(world.bodies) == 1


async def test_a_request_that_takes_too_long_is_504():
    world = World(request_timeout=0.02)
    answer = await asyncio.wait_for(world.ask(Connection(COMPLETIONS_PATH, BODY)), 1)
    assert (answer.status, answer.error["type"]) == (504, "GatewayTimeoutError")
    assert world.ended.is_set()
    assert world.admission.running_requests == 0


async def test_a_stream_that_takes_too_long_ends_with_an_error_event():
    world = World(request_timeout=0.02)
    answer = await asyncio.wait_for(world.ask(Connection(CHAT_PATH, CHAT)), 1)
    first, error, done = answer.body.decode().strip().split("\n\n")
    assert (answer.status, first, done) == (200, "data: 1", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 504
    assert answer.messages[-1].get("more_body", False) is False
    assert world.ended.is_set()


async def test_waiting_counts_as_time():
    world = World(max_running=1, request_timeout=0.05)
    first = world.ask(Connection(COMPLETIONS_PATH, BODY))
    second = world.ask(Connection(COMPLETIONS_PATH, BODY))
    assert [(await asyncio.wait_for(task, 1)).status for task in (first, second)] == [504, 504]
    assert world.admission.queued_requests == 0
