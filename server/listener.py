"""The socket and the HTTP connections on it, bounded in number, in time and in the length of their headers."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import error_body
from server.limits import RequestLimits
from sparse_backend.errors import UserError

# Seconds an idle connection is kept: longer than the pools of common clients keep theirs, or they would use closed ones.
_KEEP_ALIVE = 75

# Bytes of a request's line and headers; a client that sends more is cut off.
_LONGEST_HEADERS = 64 << 10


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening TCP socket.

    Raises:
        UserError: there is no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host}: no address to listen on ({error.strerror}). Give an address of this machine."
        ) from None
    with listener:
        # A port whose last connections are still winding down is free; one that somebody listens on is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot listen on {host}:{port} ({error.strerror}). Stop the program that has the port"
                f" (`ss -ltnp 'sport = :{port}'` names it) or give another --port."
            ) from None
        yield listener


class HttpServer(uvicorn.Server):
    """uvicorn, with signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handler: a signal means drain, which uvicorn's own know nothing of."""
        yield


def bounded_protocol(limits: RequestLimits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which alone would wait for headers for ever and keep any length of them."""

    class BoundedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.close()
            else:
                self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_are_here()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is not None:
                self._header_bytes += len(data)
            super().data_received(data)
            # What came with the last of the headers is body: only headers that have not ended are too long.
            if self._deadline is not None and self._header_bytes > _LONGEST_HEADERS:
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_headers()

        def on_headers_complete(self) -> None:
            self._headers_are_here()
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(error_body(400, "The request is not valid HTTP.")).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
            self.transport.close()

        def _expect_headers(self) -> None:
            if self._deadline is None:
                self._header_bytes = 0
                self._deadline = self.loop.call_later(limits.header_timeout, self.transport.close)

        def _headers_are_here(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return BoundedProtocol


def http_server(app: Any, limits: RequestLimits, log_level: str, close_timeout: int) -> HttpServer:
    """An HTTP server for ``app``, not started yet.

    Args:
        app: an ASGI app.
        limits: bounds of connections and headers.
        log_level: least severe messages of uvicorn's that are shown.
        close_timeout: seconds it gets to close connections once their requests are done or cut.
    """
    return HttpServer(
        uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            lifespan="off",
            ws="none",
            log_level=log_level,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=close_timeout,
        )
    )
