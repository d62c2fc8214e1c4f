import hashlib
import hmac

import pytest

from server.auth import ApiKeyMiddleware

KEY, OTHER = b"secret-one", b"secret-two"


class Recorder:
    """An app that notes the paths which reached it."""

    def __init__(self) -> None:
        self.reached = []

    async def __call__(self, scope, receive, send):
        self.reached.append(scope.get("raw_path"))
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})


async def ask(raw_path: bytes, *authorization: bytes, path: str = "/livez", type_: str = "http"):
    """Send one request whose decoded path lies (it names a probe); returns (sent messages, paths that got through)."""
    app = Recorder()
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", value) for value in authorization]
    scope = {"type": type_, "method": "GET", "path": path, "raw_path": raw_path, "headers": headers}
    await ApiKeyMiddleware(app, [KEY.decode(), OTHER.decode()])(scope, None, send)
    return sent, app.reached


@pytest.mark.parametrize("raw_path", [b"/livez", b"/readyz", b"/health"])
async def test_probes_need_no_key(raw_path):
    sent, reached = await ask(raw_path)
    assert (sent[0]["status"], reached) == (200, [raw_path])


@pytest.mark.parametrize(
    "raw_path",
    [
        b"/v1/models",
        b"//v1/models",
        b"/v1//models",
        b"/%76%31/models",
        b"/metrics",
        b"/metrics/",
        b"/docs",
        b"/openapi.json",
        b"/unknown",
        b"//",
        b"/page/",
        b"/page/absent.js",
        b"",
        b"*",
        # Not the probes, byte for byte, whatever a router would make of them.
        b"/livez/",
        b"//livez",
        b"/livez/../v1/models",
        b"/%6civez",
        b"/LIVEZ",
        b"/livez;x",
        b"/health%2f..%2fv1/models",
        b"http://host/livez",
    ],
)
async def test_everything_else_is_refused_before_it_is_looked_up(raw_path):
    sent, reached = await ask(raw_path)
    assert (sent[0]["status"], reached) == (401, [])
    assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    assert b'"type":"UnauthorizedError"' in sent[1]["body"]


@pytest.mark.parametrize("value", [b"Bearer secret-one", b"bearer secret-one", b"BEARER  secret-two "])
async def test_any_of_the_keys_opens(value):
    sent, reached = await ask(b"/v1/models", value)
    assert (sent[0]["status"], reached) == (200, [b"/v1/models"])


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"secret-one"],
        [b"Basic secret-one"],
        [b"Bearer secret"],
        [b"Bearer secret-one-and-more"],
        [b"Bearer SECRET-ONE"],
        [b"Bearer \xff\xfe"],
        [b"Bearer " + hashlib.sha256(KEY).hexdigest().encode()],
        # Somebody before us may have checked the other one.
        [b"Bearer secret-one", b"Bearer secret-one"],
        [b"Bearer wrong", b"Bearer secret-one"],
    ],
)
async def test_anything_else_does_not(values):
    sent, reached = await ask(b"/v1/models", *values)
    assert (sent[0]["status"], reached) == (401, [])


async def test_websockets_are_closed():
    sent, reached = await ask(b"/livez", b"Bearer secret-one", type_="websocket")
    assert (sent, reached) == ([{"type": "websocket.close", "code": 1008}], [])


async def test_every_key_is_compared_whichever_matches(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or a == b)
    await ask(b"/v1/models", b"Bearer secret-one")
    await ask(b"/v1/models", b"Bearer wrong")
    assert len(compared) == 4
    assert all(len(digest) == 32 for digest in compared)
