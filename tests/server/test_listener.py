"""The bounds of connections, against a real socket."""

import asyncio
import contextlib
import json

import pytest

from server.limits import RequestLimits
from server.listener import http_server, listen
from tests.e2e.servers import free_port


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@contextlib.asynccontextmanager
async def serving(**limits):
    port = free_port()
    with listen("127.0.0.1", port) as socket:
        server = http_server(hello, RequestLimits(**limits), "error", 1)
        task = asyncio.create_task(server.serve(sockets=[socket]))
        try:
            yield port
        finally:
            server.should_exit = True
            await task


async def talk(port: int, *parts: bytes, pause: float = 0) -> bytes:
    """Send the parts; returns what comes back until the server closes or is silent for a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        while piece := await asyncio.wait_for(reader.read(65536), 1):
            received += piece
        received += b"<closed>"
    writer.close()
    return received


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_an_ordinary_request_is_answered_and_the_connection_kept():
    async with serving(header_timeout=0.3) as port:
        assert (await talk(port, GET)).endswith(b"hi")
        assert (await talk(port, GET, GET, pause=0.5)).count(b"hi") == 2


@pytest.mark.parametrize("parts", [(), (b"GET / HTTP/1.1\r\n",), (b"GET / HTTP/1.1\r\nHost: x\r\n",), (GET, b"GET /")])
async def test_headers_that_do_not_come_are_not_waited_for(parts):
    async with serving(header_timeout=0.2) as port:
        assert (await talk(port, *parts, pause=0.05)).endswith(b"<closed>")


async def test_headers_without_end_are_not_kept():
    endless = [b"X-Filler: " + b"x" * 8000 + b"\r\n"] * 20
    async with serving(header_timeout=30) as port:
        received = await talk(port, b"GET / HTTP/1.1\r\n", *endless, pause=0.01)
    assert b"hi" not in received


async def test_connections_past_the_limit_are_closed():
    async with serving(max_connections=2, header_timeout=30) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert b"hi" not in await talk(port, GET)
        held[0][1].close()
        await asyncio.sleep(0.05)
        assert (await talk(port, GET)).endswith(b"hi")
        held[1][1].close()


async def test_what_is_no_http_is_answered_as_everything_else():
    async with serving() as port:
        received = await talk(port, b"\x16\x03\x01 not http\r\n\r\n")
    head, body = received.removesuffix(b"<closed>").split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == 400
