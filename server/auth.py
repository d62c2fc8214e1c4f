"""API keys: every path but the probes needs one, decided on the raw request before anything looks the path up."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response
from server.health import PROBE_PATHS
from server.page import PAGE_PATHS

_OPEN = frozenset(path.encode() for path in (*PROBE_PATHS, *PAGE_PATHS))


class ApiKeyMiddleware:
    """Answers 401 unless ``Authorization: Bearer KEY`` names a known key; probe paths, byte for byte, pass without."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        # Hashes have one length and are what is compared: timing tells nothing of a key, and memory holds none.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        response = error_response(
            401,
            "A valid API key is needed: send it as `Authorization: Bearer KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        if scope["raw_path"] in _OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Two headers are ambiguous: whoever stands before us might have checked the other one.
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # No early exit: the time must not tell which key matched.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)
