import hashlib
import hmac

import pytest

from server.auth import KeyCheck, KeyRing, parse_key
from server.record import RequestRecord, current_request
from sparse_backend.errors import UserError
from tests.server.asgi import Answer

KEY, OTHER = b"secret-one", b"secret-two"
KEYS = ["alice secret-one", "secret-two"]


class Recorder:
    """An app that notes the paths which reached it, and whose key opened."""

    def __init__(self) -> None:
        self.reached = []
        self.names = []

    async def __call__(self, scope, receive, send):
        self.reached.append(scope.get("raw_path"))
        self.names.append(current_request.get().key)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(raw_path: bytes, *authorization: bytes, path="/livez", type_="http", keys=KEYS, metrics="key"):
    """Send one request whose decoded path lies (it names a probe); returns (answer, the app)."""
    app = Recorder()
    answer = Answer()

    async def send(message):
        answer.messages.append(message)

    current_request.set(RequestRecord("id", "GET", path))
    headers = [(b"authorization", value) for value in authorization]
    scope = {"type": type_, "method": "GET", "path": path, "raw_path": raw_path, "headers": headers}
    await KeyCheck(app, KeyRing(keys), metrics)(scope, None, send)
    return answer, app


@pytest.mark.parametrize("raw_path", [b"/livez", b"/readyz", b"/health"])
async def test_probes_need_no_key(raw_path):
    answer, app = await ask(raw_path)
    assert (answer.status, app.reached) == (200, [raw_path])


NOT_THE_PROBES = [
    b"/v1//models",
    b"//v1/models",
    b"/%76%31/models",
    b"/metrics/",
    b"/unknown",
    b"//",
    b"/page/",
    b"/page/../v1/models",
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
]


@pytest.mark.parametrize("raw_path", [*NOT_THE_PROBES, b"/v1/models", b"/metrics", b"/docs", b"/openapi.json"])
async def test_everything_else_is_refused_before_it_is_looked_up(raw_path):
    answer, app = await ask(raw_path)
    assert (answer.status, app.reached) == (401, [])
    assert (b"www-authenticate", b"Bearer") in answer.messages[0]["headers"]
    assert answer.error["type"] == "UnauthorizedError"


@pytest.mark.parametrize("keys", [KEYS, []])
@pytest.mark.parametrize("raw_path", NOT_THE_PROBES)
async def test_a_path_that_is_not_in_the_table_is_nobodys(raw_path, keys):
    answer, app = await ask(raw_path, b"Bearer secret-one", keys=keys)
    assert (answer.status, app.reached) == (404, [])


async def test_without_keys_known_paths_are_everybodys():
    answer, app = await ask(b"/v1/models", keys=[])
    assert (answer.status, app.names) == (200, [None])


@pytest.mark.parametrize(
    ("value", "name"),
    [(b"Bearer secret-one", "alice"), (b"bearer secret-one", "alice"), (b"BEARER  secret-two ", "key-2")],
)
async def test_any_of_the_keys_opens_and_its_name_is_noted(value, name):
    answer, app = await ask(b"/v1/models", value)
    assert (answer.status, app.reached, app.names) == (200, [b"/v1/models"], [name])


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
        [b"Bearer alice secret-one"],
        [b"Bearer SECRET-ONE"],
        [b"Bearer \xff\xfe"],
        [b"Bearer " + hashlib.sha256(KEY).hexdigest().encode()],
        [b"Bearer sha256:" + hashlib.sha256(KEY).hexdigest().encode()],
        # Somebody before us may have checked the other one.
        [b"Bearer secret-one", b"Bearer secret-one"],
        [b"Bearer wrong", b"Bearer secret-one"],
    ],
)
async def test_anything_else_does_not(values):
    answer, app = await ask(b"/v1/models", *values)
    assert (answer.status, app.reached) == (401, [])


@pytest.mark.parametrize(
    ("metrics", "keys", "without_key", "with_key"),
    [
        ("key", KEYS, 401, 200),
        ("everybody", KEYS, 200, 200),
        ("nobody", KEYS, 401, 404),
        ("nobody", [], 404, 404),
        ("key", [], 200, 200),
    ],
)
async def test_metrics_have_a_setting_of_their_own(metrics, keys, without_key, with_key):
    answers = [
        await ask(b"/metrics", keys=keys, metrics=metrics),
        await ask(b"/metrics", b"Bearer secret-one", keys=keys, metrics=metrics),
    ]
    assert [answer.status for answer, _ in answers] == [without_key, with_key]


async def test_websockets_are_closed():
    answer, app = await ask(b"/livez", b"Bearer secret-one", type_="websocket")
    assert (answer.messages, app.reached) == ([{"type": "websocket.close", "code": 1008}], [])


async def test_every_key_is_compared_whichever_matches(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or a == b)
    await ask(b"/v1/models", b"Bearer secret-one")
    await ask(b"/v1/models", b"Bearer wrong")
    assert len(compared) == 4
    assert all(len(digest) == 32 for digest in compared)


def test_memory_holds_no_key():
    ring = KeyRing(KEYS)
    assert "secret-one" not in repr(vars(ring))
    assert ring.name_of(KEY) == "alice"


@pytest.mark.parametrize(
    ("entry", "name"),
    [("k", "key-3"), ("bob k", "bob"), (f"bob sha256:{hashlib.sha256(b'k').hexdigest()}", "bob"), (" bob\tk ", "bob")],
)
def test_spellings_of_a_key(entry, name):
    assert parse_key(entry, 3) == (name, hashlib.sha256(b"k").digest())


@pytest.mark.parametrize("entry", ["", " ", "a b c", "bob sha256:", "bob sha256:00", "sha256:xyz"])
def test_entries_that_are_no_key(entry):
    with pytest.raises(ValueError, match=r"key|stand"):
        parse_key(entry, 1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# team one\n carol k3 \n\nk4\n")
    return path


def test_keys_of_a_file(file):
    ring = KeyRing(["k1"], file)
    assert [ring.name_of(key) for key in (b"k1", b"k3", b"k4", b"k5")] == ["key-1", "carol", "key-3", None]


def test_a_changed_file_is_taken_over(file, capsys):
    ring = KeyRing([], file)
    replacement = file.with_name("new")
    replacement.write_text("k5")
    replacement.replace(file)
    ring.reload()
    assert [ring.name_of(key) for key in (b"k3", b"k5")] == [None, "key-1"]
    assert "1 API keys" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "a b c", b"\xff\xfe", None])
def test_a_file_that_cannot_be_used_leaves_the_keys_as_they_are(file, content, capsys):
    ring = KeyRing([], file)
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    ring.reload()
    assert ring.name_of(b"k3") == "carol"
    assert "stay as they are" in capsys.readouterr().err
    ring.reload()
    assert capsys.readouterr().err == "", "told once"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "holds no key"), ("# only a comment\n", "holds no key"), ("k\na b c", "line 2: write KEY")],
)
def test_a_key_file_without_usable_keys_does_not_open_the_server(text, expected, file):
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        KeyRing([], file)


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--api-key-file .* cannot be read"):
        KeyRing([], tmp_path / "absent")
