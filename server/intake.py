"""From a raw request to an admitted one: rate, queue, body, policy, turn, time."""

import asyncio
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission import Admission
from server.errors import CLIENT_CLOSED_REQUEST, RefusalError
from server.exchange import ClientGoneError, Exchange, read_body
from server.limits import RequestLimits
from server.metrics import ServerMetrics
from server.paths import CHAT_PATH, COMPLETIONS_PATH
from server.policy import SERVED_FIELDS, RequestPolicy, Work, serialise
from server.rates import KeyRates
from server.record import RequestRecord, current_request

_GENERATING = frozenset({CHAT_PATH, COMPLETIONS_PATH})


class Intake:
    """Every request with a body passes here on its way to vLLM."""

    def __init__(
        self,
        app: ASGIApp,
        limits: RequestLimits,
        policy: RequestPolicy,
        rates: KeyRates,
        admission: Admission,
        metrics: ServerMetrics,
    ) -> None:
        self._app = app
        self._limits = limits
        self._policy = policy
        self._rates = rates
        self._admission = admission
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        path = scope["path"]
        if path not in SERVED_FIELDS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        record = current_request.get()
        try:
            await self._answer(path, record, scope, receive, send)
        except ClientGoneError:
            record.status = CLIENT_CLOSED_REQUEST
        except RefusalError as refusal:
            self._metrics.rejected(refusal)
            await refusal.response()(scope, receive, send)

    async def _answer(self, path: str, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        self._rates.take_request(record.key)
        if path in _GENERATING:
            self._admission.check(record.key)
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise RefusalError(400, "The Content-Type is not application/json.")
        limits = self._limits
        content = await read_body(receive, headers.get(b"content-length"), limits.max_body_bytes, limits.header_timeout)
        body = self._policy.parse(path, content)
        record.prompt = body.get("messages", body.get("prompt"))
        exchange = Exchange(serialise(body), receive, send)
        left = limits.request_timeout - (time.monotonic() - record.arrived)
        timer = asyncio.get_running_loop().call_later(left, exchange.expire)
        try:
            if path in _GENERATING:
                await self._generate(self._policy.work(body), record, exchange, scope)
            else:
                await self._app(scope, exchange.receive, exchange.send)
            if exchange.gone:
                raise ClientGoneError
            await exchange.finish(scope)
        finally:
            timer.cancel()

    async def _generate(self, work: Work, record: RequestRecord, exchange: Exchange, scope: Scope) -> None:
        began = time.monotonic()
        try:
            await exchange.wait_for(self._admission.enter(record.key, work))
        finally:
            record.queued = time.monotonic() - began
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._admission.leave(work)
            self._rates.take_tokens(record.key, record.prompt_tokens + record.output_tokens)
