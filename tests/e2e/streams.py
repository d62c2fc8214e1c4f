"""Many clients at once over plain sockets, so that they cost the machine little beside the server they load."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What became of one request. Times are seconds from when it was sent."""

    status: int | None = None
    """None: the connection ended without an answer."""
    retry_after: int | None = None
    tokens: list[float] = field(default_factory=list)
    """When each event with a choice came."""
    error: int | None = None
    """Code of the error, of the answer or inside the stream."""
    complete: bool = False
    """The last token is there: the answer was not cut."""
    done: bool = False
    """The stream ended as streams should, or the answer was whole."""


class Request:
    """One request on a connection of its own."""

    def __init__(self, port: int, body: Mapping[str, object], headers: Mapping[str, str], path: str) -> None:
        content = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Connection: close"]
        lines += [f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items())]
        self._raw = "\r\n".join([*lines, "", ""]).encode() + content
        self._port = port
        self.outcome = Outcome()
        self.first = asyncio.Event()
        """Set with the first event of the stream."""

    async def run(self) -> Outcome:
        """Send it and read the answer to its end."""
        try:
            reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            self._began = time.monotonic()
            self._writer.write(self._raw)
            await self._read_head(reader)
            async for line in reader:
                self._take(line)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.first.set()
            if hasattr(self, "_writer"):
                self._writer.close()
        return self.outcome

    @property
    def connected(self) -> bool:
        """True once it was sent."""
        return hasattr(self, "_began")

    def leave(self) -> None:
        """Go away."""
        self._writer.transport.abort()

    async def _read_head(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        self.outcome.status = int(head[0].split()[1])
        for line in head[1:]:
            name, _, value = line.partition(": ")
            if name == "retry-after":
                self.outcome.retry_after = int(value)

    def _take(self, line: bytes) -> None:
        if line.startswith(b'data: {"error"') or line.startswith(b'{"error"'):
            self.outcome.error = json.loads(line.removeprefix(b"data: "))["error"]["code"]
            self.outcome.done = self.outcome.status != 200
        elif line.startswith(b"data: [DONE]") or line.startswith(b'{"id"'):
            self.outcome.done = True
        elif line.startswith(b"data: "):
            self.outcome.tokens.append(time.monotonic() - self._began)
            self.outcome.complete |= b'"finish_reason":"length"' in line
            self.first.set()
