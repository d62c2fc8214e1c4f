"""One exchange with a client: its body, whether it is still there, and what it has been sent."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from server.errors import RefusalError, stream_error

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client went away; nobody is left to be answered."""


async def read_body(receive: Receive, declared: bytes | None, limit: int, seconds: float) -> bytes:
    """The request's body.

    Args:
        receive: of the request.
        declared: its Content-Length header, if there is one.
        limit: bytes it may have.
        seconds: time it may take.

    Raises:
        RefusalError: 413 or 408.
        ClientGoneError: the client went away.
    """
    too_long = RefusalError(413, f"The body is longer than {limit} bytes.", reason="body_bytes")
    if declared is not None and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RefusalError(408, f"The body did not arrive within {seconds:g} s.", reason="timeout") from None


class Exchange:
    """Stands between an app and a connection whose request body was read.

    An app that takes too long is told that the client went away, which is what vLLM's routes heed, streaming or not; its
    later messages are dropped, and ``finish`` ends the answer in its place.
    """

    def __init__(self, body: bytes, receive: Receive, send: Send) -> None:
        self._body: bytes | None = body
        self._send = send
        self._gone = asyncio.ensure_future(receive())
        self._expired: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._begun = False
        self._streaming = False
        self._ended = False
        self._lost = False

    @property
    def gone(self) -> bool:
        """True if the client went away before its answer was complete."""
        return self._lost or (self._gone.done() and not self._ended)

    async def wait_for(self, work: Coroutine[None, None, T]) -> T:
        """The result of ``work``, which is cancelled if the client goes away or time is up before.

        Raises:
            ClientGoneError: the client went away.
            RefusalError: 504; time is up.
        """
        task = asyncio.ensure_future(work)
        ends: set[asyncio.Future[Any]] = {task, self._gone, self._expired}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientGoneError if self._gone.done() else _too_slow()
        finally:
            task.cancel()

    def expire(self) -> None:
        """Time is up."""
        if not self._expired.done():
            self._expired.set_result(None)

    async def receive(self) -> Message:
        """What the app receives: the body, then nothing until it should stop."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        ends: set[asyncio.Future[Any]] = {self._gone, self._expired}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """What the app sends goes to the client, unless time is up."""
        if self._expired.done():
            return
        # An app that notices may still send an answer, to nobody.
        self._lost |= self._gone.done()
        if message["type"] == "http.response.start":
            self._begun = True
            self._streaming = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def finish(self, scope: Scope) -> None:
        """End an answer that the app could not end in time."""
        self._gone.cancel()
        if not self._expired.done() or self._ended:
            return
        refusal = _too_slow()
        if not self._begun:
            await refusal.response()(scope, self.receive, self._send)
        elif self._streaming:
            body = stream_error(refusal.status, refusal.message)
            await self._send({"type": "http.response.body", "body": body})


def _too_slow() -> RefusalError:
    return RefusalError(504, "The request took longer than the server allows.", reason="timeout")
