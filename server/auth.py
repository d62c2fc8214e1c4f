"""API keys: who may use a path, decided on the raw request before anything looks the path up."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response
from server.paths import ACCESS, Access
from server.progress import say
from server.record import current_request
from sparse_backend.errors import UserError

MetricsAccess = Literal["key", "everybody", "nobody"]

_HASHED = "sha256:"


def parse_key(entry: str, position: int) -> tuple[str, bytes]:
    """Name and SHA-256 of a key written ``KEY`` or ``NAME KEY``, where KEY may be ``sha256:`` and its hash in hex.

    A key without a name is called after its position: "key-1", …

    Raises:
        ValueError: the entry is empty, has more than two words, or its hash is none.
    """
    words = entry.split()
    if not words:
        raise ValueError("a key is empty")
    if len(words) > 2:
        raise ValueError("write KEY or NAME KEY: a key has no space in it")
    name = words[0] if len(words) == 2 else f"key-{position}"
    if not words[-1].startswith(_HASHED):
        return name, hashlib.sha256(words[-1].encode()).digest()
    try:
        digest = bytes.fromhex(words[-1].removeprefix(_HASHED))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError(f"behind {_HASHED} stand 64 hex digits")
    return name, digest


class KeyRing:
    """The keys that open the server, from settings and from a file that may change while it runs."""

    def __init__(self, entries: Iterable[str], file: Path | None = None) -> None:
        """Read all keys.

        Raises:
            UserError: the file cannot be read, holds no key, or one that cannot be used.
        """
        self._fixed = [parse_key(entry, position) for position, entry in enumerate(entries, 1)]
        self._file = file
        self._stamp = self._file_stamp()
        # Hashes have one length and are what is compared: timing tells nothing of a key, and memory holds none.
        self._keys = self._read()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def name_of(self, key: bytes) -> str | None:
        """The name of a key; None for one that is not on the ring."""
        digest = hashlib.sha256(key).digest()
        # No early exit: the time must not tell which key matched.
        names = [name for name, known in self._keys if hmac.compare_digest(digest, known)]
        return names[0] if names else None

    def reload(self) -> None:
        """Take over the file's keys if it changed; a file that cannot be used leaves the keys as they are."""
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._read()
            say(f"read {self._file} anew: {len(self._keys)} API keys")
        except UserError as error:
            say(f"the API keys stay as they are: {error}")

    def _file_stamp(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> list[tuple[str, bytes]]:
        if self._file is None:
            return self._fixed
        try:
            lines = self._file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {self._file} cannot be read: {error}.") from None
        in_file: list[tuple[str, bytes]] = []
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                try:
                    in_file.append(parse_key(line, len(self._fixed) + len(in_file) + 1))
                except ValueError as error:
                    raise UserError(f"--api-key-file {self._file}, line {number}: {error}.") from None
        if not in_file:
            raise UserError(
                f"--api-key-file {self._file} holds no key, which would serve everybody. Write one key per"
                " line, or leave the setting out."
            )
        return self._fixed + in_file


class KeyCheck:
    """Lets a request in by the table of paths and its key; a path that is not in the table is nobody's.

    Without keys every known path is everybody's. A request without a key is not told which paths there are.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, metrics: MetricsAccess = "key") -> None:
        self._app = app
        self._keys = keys
        self._access: dict[bytes, Access | None] = dict(ACCESS)
        by_setting = {"key": Access.KEY, "everybody": Access.EVERYBODY, "nobody": None}
        for path, access in ACCESS.items():
            if access is Access.METRICS:
                self._access[path] = by_setting[metrics]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        access = self._access.get(scope["raw_path"])
        name = self._key_name(scope)
        if access is not Access.EVERYBODY and self._keys and name is None:
            refusal = error_response(
                401,
                "A valid API key is needed: send it as `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
        elif access is None:
            await error_response(404, "There is nothing at this path.")(scope, receive, send)
        else:
            current_request.get().key = name
            await self._app(scope, receive, send)

    def _key_name(self, scope: Scope) -> str | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Two headers are ambiguous: whoever stands before us might have checked the other one.
        if len(given) != 1:
            return None
        scheme, _, key = given[0].partition(b" ")
        name = self._keys.name_of(key.strip())
        return name if scheme.lower() == b"bearer" else None
