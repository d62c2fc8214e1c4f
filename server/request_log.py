"""One line of JSON for each request, its id in the answer, and its count in the metrics."""

import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import CLIENT_CLOSED_REQUEST
from server.metrics import ServerMetrics
from server.paths import METRICS_PATH, PROBE_PATHS, label
from server.record import RequestRecord, current_request

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LONGEST_PATH = 128

# Asked every few seconds by machines: counted, not logged.
_UNLOGGED = frozenset(path.encode() for path in (*PROBE_PATHS, METRICS_PATH))


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is one and of 1 to 64 letters, digits, dots, dashes and underscores; else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    return given[0].decode() if len(given) == 1 and _ID.fullmatch(given[0]) else uuid.uuid4().hex


class RequestLog:
    """Outermost in the chain: whatever comes of a request is logged and counted, and carries its id."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        density: Callable[[str], float | None],
        write: Callable[[str], None] | None,
        *,
        prompts: bool = False,
    ) -> None:
        """Hold where lines go.

        Args:
            app: the rest of the chain.
            metrics: counts the requests.
            density: share of active neurons of a request that has been answered, by its id; None if it is not known.
            write: takes one line without its end; None writes none.
            prompts: whether a line has the prompt's text.
        """
        self._app = app
        self._metrics = metrics
        self._density = density
        self._write = write
        self._prompts = prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        raw_path = scope["raw_path"]
        path = raw_path[:_LONGEST_PATH].decode("latin-1")
        record = RequestRecord(request_id(scope), scope["method"], path)
        current_request.set(record)
        # vLLM takes the id from this header, unchecked.
        others = [header for header in scope["headers"] if header[0] != b"x-request-id"]
        scope["headers"] = [*others, (b"x-request-id", record.id.encode())]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            status = CLIENT_CLOSED_REQUEST if record.status is None else record.status
            self._metrics.answered(label(raw_path), status)
            if self._write is not None and raw_path not in _UNLOGGED:
                self._write(self._line(record, status))

    def _line(self, record: RequestRecord, status: int) -> str:
        seconds = time.monotonic() - record.arrived
        fields: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": record.id,
            "key": record.key,
            "method": record.method,
            "path": record.path,
            "status": status,
            "seconds": round(seconds, 4),
        }
        if record.prompt_tokens:
            fields |= {
                "queued_seconds": round(record.queued, 4),
                "prompt_tokens": record.prompt_tokens,
                "output_tokens": record.output_tokens,
                "ttft_seconds": _rounded(record.time_to_first_token),
                "itl_seconds": _rounded(record.inter_token_latency),
                "density": _rounded(self._density(record.id)),
            }
        if self._prompts and record.prompt is not None:
            fields["prompt"] = record.prompt
        return json.dumps(fields, ensure_ascii=True)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
