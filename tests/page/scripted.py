"""The server's own chain of apps on a real port, with a script in place of vLLM: what each test needs it to do."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter

from server.admission import Admission
from server.app import api_app, operations_app, operations_routers, outer_chain
from server.auth import KeyRing
from server.batching import BatchingTelemetry
from server.health import FrontDoor, Health
from server.metrics import ServerMetrics
from server.settings import Settings
from server.telemetry import SparsityTelemetry
from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot
from tests.e2e.servers import free_port
from tests.server.test_telemetry import D_FF, snapshot

DENSITIES = (0.18, 0.04, 0.06, 0.11)
"""Of each layer, whatever is generated."""


class ScriptedServer:
    """Answers every prompt with ``words``; its counters count one token row for each."""

    def __init__(self) -> None:
        self.words = [f"word{index} " for index in range(12)]
        self.going = threading.Event()
        """While it is clear, answers stop after their third word."""
        self.going.set()
        self.failure: dict[str, Any] | None = None
        """An error event to send after the third word."""
        self.requests: list[dict[str, Any]] = []
        self._rows = 0
        self._vllm = CollectorRegistry()
        self._tokens = Counter("vllm:generation_tokens", "Tokens.", registry=self._vllm)
        telemetry = SparsityTelemetry([0.17, 0.05, 0.06, 0.10])
        self._settings = Settings.load({"model": "scripted", "request_log": "off"})
        self.health = Health(self._settings.stall_timeout)
        self._metrics = ServerMetrics(self.health, Admission(self._settings))
        routers = operations_routers(self.health, telemetry, [lambda: self._vllm])
        self._telemetry = telemetry
        self._door = FrontDoor(self.health, operations_app(routers))
        self._door.api = self._api(routers)
        self.keys: list[str] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        config = uvicorn.Config(
            self._app, interface="asgi3", host="127.0.0.1", port=self.port, lifespan="off", log_level="warning"
        )
        self._http = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._http.serve()])
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._http.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._http.should_exit = True
        self._http.force_exit = True
        self._thread.join(20)
        self._loop.close()

    def ready(self) -> None:
        """Let requests in."""
        asyncio.run_coroutine_threadsafe(self._telemetry.start(self._snapshots), self._loop).result(20)
        self.health.ready(self)

    died = False

    def stalled(self) -> float:
        """What ``server.health.Engine`` asks for."""
        return 0.0

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        keys = KeyRing(self.keys)
        chain = outer_chain(self._door, self._settings, keys, self._metrics, BatchingTelemetry("fcfs"), print)
        await chain(scope, receive, send)

    def _api(self, routers: Any) -> FastAPI:
        app = api_app(routers)

        @app.get("/v1/models")
        async def models() -> JSONResponse:
            return JSONResponse({"data": [{"id": "scripted"}]})

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def generate(request: Request) -> StreamingResponse:
            body = await request.json()
            self.requests.append(body)
            return StreamingResponse(self._answer("messages" in body), media_type="text/event-stream")

        return app

    async def _answer(self, chat: bool) -> AsyncIterator[str]:
        for index, word in enumerate(self.words):
            await asyncio.sleep(0.02)
            if index == 3:
                await asyncio.to_thread(self.going.wait, 60)
            if self.failure and index == 3:
                yield f"data: {json.dumps({'error': self.failure})}\n\n"
                return
            self._rows += 1
            self._tokens.inc()
            text = {"delta": {"content": word}} if chat else {"text": word}
            last = index == len(self.words) - 1
            yield f"data: {json.dumps({'choices': [{**text, 'finish_reason': 'stop' if last else None}]})}\n\n"
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.words)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    async def _snapshots(self) -> list[SparsitySnapshot]:
        records = [snapshot(self._rows, self._rows * D_FF * d, self._rows * D_FF * d, self._rows)[0] for d in DENSITIES]
        layers = [{**record["layers"][0], "layer": str(index)} for index, record in enumerate(records)]
        return [{**records[0], "layers": layers}]
