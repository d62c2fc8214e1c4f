import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import RefusalError
from server.limits import RequestLimits
from server.paths import CHAT_PATH, COMPLETIONS_PATH, DETOKENIZE_PATH, TOKENIZE_PATH
from server.policy import SERVED_FIELDS, RequestPolicy, Work, serialise

CONTEXT = 512
HELLO = [{"role": "user", "content": "hello"}]


def policy(**limits) -> RequestPolicy:
    return RequestPolicy(RequestLimits(**limits), CONTEXT)


def parse(body: object, path: str = COMPLETIONS_PATH, **limits):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return policy(**limits).parse(path, content)


def refused(body: object, path: str = COMPLETIONS_PATH, **limits) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        parse(body, path, **limits)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        json.dumps({"prompt": [[[[[[1]]]]]] * 2, "stop": json.loads("[" * 70 + "]" * 70)}).encode(),
    ],
)
def test_what_is_no_request_is_refused(content):
    assert refused(content).message.startswith("The body ")


def test_what_was_checked_is_what_is_passed_on():
    # Of a field given twice parsers may take either.
    body = parse(b'{"prompt": "x", "n": 100, "n": 2, "prompt": "\\u00e9\xc3\xa9"}')
    assert serialise(body) == '{"prompt": "éé", "n": 2}'.encode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_PATH, {"messages": HELLO, "chat_template": "{{ 1 }}"}),
        (CHAT_PATH, {"messages": HELLO, "mm_processor_kwargs": {"a": 1}}),
        (CHAT_PATH, {"messages": HELLO, "media_io_kwargs": {}}),
        (CHAT_PATH, {"messages": HELLO, "audio": {"voice": "x"}}),
        (CHAT_PATH, {"messages": HELLO, "modalities": ["text", "audio"]}),
        (CHAT_PATH, {"messages": HELLO, "functions": []}),
        (CHAT_PATH, {"messages": HELLO, "priority": -1}),
        (COMPLETIONS_PATH, {"prompt_embeds": "AAAA"}),
        (COMPLETIONS_PATH, {"prompt": "x", "prompt_embeds": ["AAAA"]}),
        (COMPLETIONS_PATH, {"prompt": "x", "kv_transfer_params": {}}),
        (COMPLETIONS_PATH, {"prompt": "x", "vllm_xargs": {}}),
        (COMPLETIONS_PATH, {"prompt": "x", "use_beam_search": True}),
        (COMPLETIONS_PATH, {"prompt": "x", "request_id": "mine"}),
        (COMPLETIONS_PATH, {"prompt": "x", "no_such_field": 1}),
        (TOKENIZE_PATH, {"messages": HELLO, "chat_template": "{{ 1 }}"}),
        (DETOKENIZE_PATH, {"tokens": [1], "prompt": "x"}),
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(path, body):
    field = next(
        name for name in reversed(body) if name not in ("messages", "tokens") and name not in SERVED_FIELDS[path]
    )
    assert refused(body, path).param == field
    if field != "chat_template":
        assert field not in parse(body, path, unknown_fields="ignore")


def test_a_template_is_refused_whatever_the_policy():
    assert (
        refused({"messages": HELLO, "chat_template": "x"}, CHAT_PATH, unknown_fields="ignore").param == "chat_template"
    )


def test_a_field_name_that_is_no_name_is_not_repeated():
    assert "\n" not in refused({"prompt": "x", "a\nb": 1}).message
    assert len(refused({"prompt": "x", "a" * 10_000: 1}).message) < 100


def test_fields_that_change_nothing_are_dropped():
    harmless = {"store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "auto", "modalities": ["text"]}
    unset = {"audio": None, "functions": None, "prompt_embeds": None}
    assert parse({"messages": HELLO, **harmless, **unset}, CHAT_PATH) == {"messages": HELLO}


@pytest.mark.parametrize(
    ("path", "body", "limit", "param"),
    [
        (COMPLETIONS_PATH, {"prompt": ["x"] * 33}, "max_prompts", "prompt"),
        (COMPLETIONS_PATH, {"prompt": [[1]] * 33}, "max_prompts", "prompt"),
        (COMPLETIONS_PATH, {"prompt": "x", "n": 9}, "max_n", "n"),
        (COMPLETIONS_PATH, {"prompt": "x", "n": 1e9}, "max_n", "n"),
        (COMPLETIONS_PATH, {"prompt": "x", "stop": ["a"] * 5}, "max_stops", "stop"),
        (COMPLETIONS_PATH, {"prompt": "x", "stop_token_ids": [1] * 5}, "max_stops", "stop_token_ids"),
        (COMPLETIONS_PATH, {"prompt": "x", "logprobs": 21}, "max_logprobs", "logprobs"),
        (COMPLETIONS_PATH, {"prompt": "x", "prompt_logprobs": 21}, "max_logprobs", "prompt_logprobs"),
        (CHAT_PATH, {"messages": HELLO, "top_logprobs": 21}, "max_logprobs", "top_logprobs"),
        (CHAT_PATH, {"messages": HELLO, "tools": [{}] * 65}, "max_tools", "tools"),
    ],
)
def test_each_limit_holds_and_can_be_set(path, body, limit, param):
    assert refused(body, path).param == param
    assert parse(body, path, **{limit: 10**9}) == body


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "min_tokens"])
def test_the_largest_answer(field):
    body = {"messages": HELLO, field: 101}
    assert refused(body, CHAT_PATH, max_tokens=100).param == field
    assert parse(body, CHAT_PATH) == body


def test_the_whole_vocabulary_is_too_many_alternatives():
    assert refused({"prompt": "x", "logprobs": -1}).param == "logprobs"
    # Chat's is a boolean.
    assert parse({"messages": HELLO, "logprobs": True}, CHAT_PATH)


def test_a_conversation_has_a_message():
    assert refused({"messages": []}, CHAT_PATH).param == "messages"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "text", "text": "x", "image_url": "http://169.254.169.254/"},
        {"image_url": "http://169.254.169.254/"},
    ],
)
def test_only_text_is_served(part):
    for path in (CHAT_PATH, TOKENIZE_PATH):
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
        assert refused(body, path).param == "messages"


def test_names_that_a_template_may_be_given():
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    assert parse(body, CHAT_PATH) == body
    body["chat_template_kwargs"]["tools"] = "x"
    assert "served are: enable_thinking." in refused(body, CHAT_PATH).message
    assert parse(body, CHAT_PATH, chat_template_kwargs="enable_thinking, tools") == body


def schema_bodies(schema: object) -> list[tuple[str, dict[str, object]]]:
    """Every way a request can bring a schema."""
    answer = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return [
        (CHAT_PATH, {"messages": HELLO, "response_format": answer}),
        (CHAT_PATH, {"messages": HELLO, "tools": [tool]}),
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": {"json": schema}}),
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": {"json": json.dumps(schema)}}),
    ]


def deep(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(levels - 1):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD_SCHEMAS = {
    "long": {"enum": ["x" * 40_000]},
    "deep": deep(17),
    "deep list": {"anyOf": [deep(17)]},
    "pattern": {"type": "string", "pattern": "(a+)+$"},
    "nested pattern": {"properties": {"a": {"items": {"pattern": "a"}}}},
    "pattern names": {"patternProperties": {"^a": {}}},
    "pattern behind a reference": {"$ref": "#/x", "x": {"pattern": "a"}},
    "pattern in a map used as a schema": {"$ref": "#/properties", "properties": {"pattern": "(a+)+$"}},
    "many objects": {"properties": {str(number): {} for number in range(513)}},
    "itself": {"$ref": "#"},
    "itself among others": {"anyOf": [{"type": "string"}, {"allOf": [{"$ref": "#"}]}]},
    "itself by a way round": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b%2Fc"}, "b/c": {"$ref": "#/$defs/a"}},
    },
    "itself in a list": {"items": {"$ref": "#/anyOf/0"}, "anyOf": [{"oneOf": [{"$ref": "#/anyOf/0"}]}]},
    "repeats": {"type": "string", "maxLength": 10**9},
    "negative repeats": {"type": "array", "minItems": -1},
    "reference": {"$ref": "http://169.254.169.254/latest"},
    "file": {"allOf": [{"$ref": "file:///etc/passwd"}]},
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_schemas_are_bounded_wherever_they_come(schema):
    for path, body in schema_bodies(schema):
        refused(body, path)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"pattern": {"type": "string"}, "$ref": {"type": "string"}, "maxLength": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"maxLength": 100}}},
        deep(16),
        True,
        {"properties": {"next": {"$ref": "#"}, "all": {"items": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}},
        {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "object"}}},
        {"$ref": "#/nowhere/0"},
    ],
)
def test_ordinary_schemas_pass(schema):
    for path, body in schema_bodies(schema)[:3]:
        assert parse(body, path) == body


def test_patterns_can_be_let_in_up_to_a_length():
    for path, body in schema_bodies({"pattern": "a" * 10}):
        parse(body, path, max_pattern_bytes=10)
        refused(body, path, max_pattern_bytes=9)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": {"regex": "(a+)+"}}),
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": {"grammar": "root ::= root"}}),
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": {"structural_tag": "{}"}}),
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": {"choice": ["x" * 40_000]}}),
        (COMPLETIONS_PATH, {"prompt": "x", "structured_outputs": [1]}),
        (CHAT_PATH, {"messages": HELLO, "response_format": {"type": "structural_tag"}}),
        (CHAT_PATH, {"messages": HELLO, "response_format": "json"}),
    ],
)
def test_other_ways_to_constrain_the_output_are_refused(path, body):
    assert refused(body, path).param in ("structured_outputs", "response_format")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "x" * 30, "max_tokens": 7}, Work(1, 10, 7)),
        ({"prompt": [1, 2, 3]}, Work(1, 3, 16)),
        ({"prompt": ["abc", "def"], "n": 3, "max_tokens": 5}, Work(6, 2, 30)),
        ({"prompt": [[1, 2], [3]], "max_tokens": 5}, Work(2, 3, 10)),
        ({"prompt": "é" * 3, "max_tokens": 10**9}, Work(1, 2, CONTEXT)),
        ({"messages": HELLO, "max_completion_tokens": 5}, Work(1, 13, 5)),
        ({"messages": HELLO}, Work(1, 13, CONTEXT)),
        # What is no count is vLLM's to refuse.
        ({"prompt": "abc", "n": "two", "max_tokens": -1}, Work(1, 1, 16)),
    ],
)
def test_how_much_work_a_request_asks_for(body, expected):
    assert policy().work(body) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
FIELDS = sorted(set().union(*SERVED_FIELDS.values()) | {"chat_template", "prompt_embeds", "store", "schema"})


def outcome(body: object, path: str, **limits) -> RefusalError | dict[str, object]:
    try:
        return parse(body, path, **limits)
    except RefusalError as refusal:
        return refusal


@given(st.sampled_from(sorted(SERVED_FIELDS)), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
@settings(max_examples=400, deadline=None)
def test_any_body_is_refused_in_words_or_passed_on_as_work(path, body):
    found = outcome(body, path)
    if isinstance(found, RefusalError):
        assert found.status == 400
        assert len(found.message) < 300
    else:
        work = policy().work(found)
        assert work.sequences >= 1
        assert work.tokens >= 0
        assert json.loads(serialise(found)) == found


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_or_are_an_object(content):
    found = outcome(content, COMPLETIONS_PATH, unknown_fields="ignore")
    assert isinstance(found, dict) or found.status == 400
