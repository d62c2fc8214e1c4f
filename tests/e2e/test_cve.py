"""What went wrong in other servers, tried against ours. Each test fails where its guard is taken out."""

import http.client
import json
import os
import socket
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import KEYS
from tests.e2e.servers import Server

pytestmark = pytest.mark.engine

PROMPT = {"model": "demo", "prompt": "import ", "max_tokens": 2}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "import "}], "max_tokens": 2}


@pytest.fixture(autouse=True)
def unharmed(guarded: Server):
    """Whatever a test sends: the engine is the same one afterwards, and serves."""
    guarded.wait_ready()
    restarts = guarded.total("sparse_engine_restarts_total")
    yield
    assert guarded.post("/v1/completions", PROMPT).status_code == 200
    assert guarded.total("sparse_engine_restarts_total") == restarts


def raw(
    server: Server, target: str, *headers: tuple[str, str], method: str = "GET", body: bytes = b""
) -> tuple[int, bytes]:
    """A request whose line is sent as it is; returns (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in (("Host", "x"), *headers, *((("Content-Length", str(len(body))),) if body else ())):
        connection.putheader(name, value)
    connection.endheaders(body or None)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def refused(server: Server, path: str, body: object) -> dict[str, object]:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models",
        "/v1//models",
        "//v1/models",
        "/%76%31/models",
        "/v1/models/",
        "/v1/models?x=/livez",
        "/livez/../v1/models",
        "/livez;/v1/models",
        "/LIVEZ",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/static/../v1/models",
        "http://127.0.0.1/v1/models",
        "/collective_rpc",
    ],
)
def test_cve_2026_48746_no_spelling_of_a_path_gets_past_the_keys(guarded: Server, target: str) -> None:
    assert raw(guarded, target)[0] == 401
    # Headers from which other servers derived the path.
    derived = [("X-Original-URL", "/livez"), ("X-Rewrite-URL", "/livez"), ("X-Forwarded-Prefix", "/livez")]
    assert raw(guarded, target, *derived)[0] == 401
    assert raw(guarded, target, ("Authorization", "Bearer wrong"))[0] == 401


def test_cve_2026_48746_unknown_paths_are_denied_before_they_are_looked_up(guarded: Server) -> None:
    key = ("Authorization", f"Bearer {KEYS['alice']}")
    for target in (
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/sleep",
        "/static/../docs",
        "/v1%2fmodels",
        "/v1/models/",
    ):
        for method in ("GET", "POST"):
            status, body = raw(guarded, target, key, method=method)
            assert (status, json.loads(body)["error"]["message"]) == (404, "There is nothing at this path.")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", PROMPT | {"n": 100_000}, "n"),
        ("/v1/chat/completions", CHAT | {"n": 9}, "n"),
        ("/v1/completions", PROMPT | {"prompt": ["x"] * 33}, "prompt"),
        ("/v1/completions", PROMPT | {"prompt": [[1]] * 33}, "prompt"),
        ("/v1/completions", PROMPT | {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ("/v1/completions", PROMPT | {"logprobs": 21}, "logprobs"),
        ("/v1/completions", PROMPT | {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/completions", PROMPT | {"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_cve_2026_34756_what_multiplies_a_request_is_bounded(guarded: Server, path, body, param) -> None:
    assert refused(guarded, path, body)["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_cve_2025_62426_a_request_brings_no_template(guarded: Server, path: str) -> None:
    endless = "{% for i in range(1000000000) %}{% endfor %}"
    chat = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    assert refused(guarded, path, chat | {"chat_template": endless})["param"] == "chat_template"
    kwargs = {"chat_template_kwargs": {"chat_template": endless}}
    assert refused(guarded, path, chat | kwargs)["param"] == "chat_template_kwargs"
    kwargs = {"chat_template_kwargs": {"tokenize": False}}
    assert refused(guarded, path, chat | kwargs)["param"] == "chat_template_kwargs"


def nested(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(40),
        {"type": "string", "pattern": "(((a{1,1000}){1,1000}){1,1000})"},
        {"type": "object", "patternProperties": {"^(a+)+$": {}}},
        {"type": "string", "maxLength": 2**31},
        {"enum": [str(number) for number in range(20_000)]},
        {"$ref": "http://169.254.169.254/latest/meta-data"},
        {"$ref": "#/x", "x": {"pattern": "(a+)+$"}},
    ],
)
def test_cve_2026_105757_schemas_are_bounded(guarded: Server, schema) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert refused(guarded, "/v1/chat/completions", CHAT | {"response_format": form})["param"] == "response_format"
    assert refused(guarded, "/v1/chat/completions", CHAT | {"tools": [tool]})["param"] == "tools"
    structured = PROMPT | {"structured_outputs": {"json": schema}}
    assert refused(guarded, "/v1/completions", structured)["param"] == "structured_outputs"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no such type"},
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"$ref": "#"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "array", "minItems": 5, "maxItems": 4},
        {"type": "string", "format": "no such format"},
        {"enum": []},
        {"not": {}},
        False,
        {"type": "array", "items": {"type": "string", "maxLength": 4096}, "maxItems": 4096},
    ],
)
def test_cve_2026_105757_a_schema_within_bounds_fails_its_own_request_at_most(guarded: Server, schema) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    began = time.monotonic()
    assert guarded.post("/v1/chat/completions", CHAT | {"response_format": form}).status_code in (200, 400)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "structured",
    [{"regex": "(a+)+$"}, {"grammar": "root ::= root"}, {"structural_tag": "{}"}, {"whitespace_pattern": ".*"}],
)
def test_cve_2026_105757_no_regular_expressions_and_grammars_of_a_clients_own(guarded: Server, structured) -> None:
    assert refused(guarded, "/v1/completions", PROMPT | {"structured_outputs": structured})


def test_cve_2026_41523_22778_54236_errors_tell_nothing_of_the_server(guarded: Server) -> None:
    requests: list[tuple[str, object]] = [
        ("/v1/completions", PROMPT | {"prompt": 7}),
        ("/v1/completions", PROMPT | {"prompt": [10**12]}),
        ("/v1/completions", PROMPT | {"prompt": [-1]}),
        ("/v1/completions", PROMPT | {"prompt": ""}),
        ("/v1/completions", PROMPT | {"max_tokens": "x" * 1000}),
        ("/v1/completions", PROMPT | {"temperature": 1e308, "top_p": -1}),
        ("/v1/completions", PROMPT | {"logit_bias": {"x": 1}}),
        ("/v1/completions", PROMPT | {"allowed_token_ids": [10**9]}),
        ("/v1/completions", PROMPT | {"stop_token_ids": [10**30]}),
        ("/v1/completions", PROMPT | {"seed": 2**70}),
        ("/v1/completions", PROMPT | {"truncate_prompt_tokens": 10**9}),
        ("/v1/completions", PROMPT | {"prompt": "x" * 1_000_000}),
        ("/v1/completions", PROMPT | {"structured_outputs": {"json": {"type": "x"}}}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "nobody"}]}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "tool", "content": None}]}),
        ("/v1/chat/completions", CHAT | {"messages": []}),
        ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}),
        ("/v1/chat/completions", CHAT | {"tool_choice": {"type": "function", "function": {"name": "absent"}}}),
        ("/v1/chat/completions", CHAT | {"continue_final_message": True}),
        ("/detokenize", {"model": "demo", "tokens": [10**12]}),
        ("/tokenize", {"model": "demo"}),
    ]
    for path, body in requests:
        answer = guarded.post(path, body)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code == 200:
            continue
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
        for secret in (
            "0x",
            "/work",
            "/home",
            "site-packages",
            ".py",
            "Traceback",
            'File "',
            "object at",
            os.sep + "tmp",
        ):
            assert secret not in answer.text, (body, answer.text)
        assert len(answer.text) < 2000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "demo", "prompt_embeds": "gAWVHAAAAAAAAACMBXBvc2l4"}),
        ("/v1/completions", PROMPT | {"prompt_embeds": ["gAWVHAAAAAAAAACMBXBvc2l4"]}),
        ("/v1/chat/completions", CHAT | {"mm_processor_kwargs": {"a": 1}}),
        ("/v1/completions", PROMPT | {"vllm_xargs": {"a": 1}}),
        (
            "/v1/completions",
            PROMPT | {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "169.254.169.254"}},
        ),
        ("/v1/completions", PROMPT | {"an_unknown_field": 1}),
    ],
)
def test_pysec_2026_2303_text_only_and_no_unknown_fields(guarded: Server, path, body) -> None:
    refused(guarded, path, body)


@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url", "input_audio", "image_embeds", "file"])
def test_remote_media_is_not_fetched(guarded: Server, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bait:
        bait.settimeout(0.3)
        url = f"http://127.0.0.1:{bait.getsockname()[1]}/"
        part = {"type": kind, kind: {"url": url, "data": url}}
        body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
        assert refused(guarded, "/v1/chat/completions", body)["param"] == "messages"
        with pytest.raises(TimeoutError):
            bait.accept()


def test_cve_2025_32444_sockets_of_the_engine_are_not_for_others(guarded: Server) -> None:
    pids = set(guarded.processes())
    links = [link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()]
    targets = [str(link.readlink()) for link in links if link.is_symlink()]
    inodes = {target[8:-1] for target in targets if target.startswith("socket:")}
    listening = [
        fields[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and fields[9] in inodes
    ]
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    assert listening
    assert [address for address in listening if address.split(":")[0] not in loopback] == []
    paths = [
        Path(fields[7])
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if len(fields := line.split()) == 8 and fields[6] in inodes and fields[7].startswith("/")
    ]
    assert paths
    for path in paths:
        assert path.parent.stat().st_mode & 0o077 == 0
        assert path.stat().st_mode & 0o077 == 0
    for segment in guarded.shared_memory():
        assert segment.stat().st_mode & 0o077 == 0
    for pid in pids:
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION=1" not in Path(f"/proc/{pid}/environ").read_text()


def test_bodies_that_never_end_are_cut(guarded: Server) -> None:
    key = ("Authorization", f"Bearer {KEYS['alice']}")
    json_type = ("Content-Type", "application/json")
    status, body = raw(guarded, "/v1/completions", key, json_type, method="POST", body=b" " * (2 << 20) + b"{}")
    assert (status, json.loads(body)["error"]["code"]) == (413, 413)
