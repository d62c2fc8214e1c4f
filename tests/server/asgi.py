"""ASGI apps called without a socket: one request as a scope, its answer as what was sent."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What an app sent."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Connection:
    """One request on a connection that a test can close."""

    def __init__(
        self, path: str, body: object = None, *, method: str = "POST", headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
        }
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        self.answer = Answer()

    def close(self) -> None:
        """The client goes away."""
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def send(self, message: dict[str, Any]) -> None:
        self.answer.messages.append(message)

    async def ask(self, app) -> Answer:
        """Run the app on this request."""
        await app(self.scope, self.incoming.get, self.send)
        return self.answer
