"""The official Python client, unmodified: a conversation with everything it offers that is served."""

import json
from collections.abc import AsyncIterator, Iterator

import openai
import pydantic
import pytest

from tests.e2e.clients.tries import until_complete
from tests.e2e.conftest import KEYS
from tests.e2e.servers import Server

pytestmark = pytest.mark.engine

MODEL = "demo"
QUESTION = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "def read(path):"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        # Without it vLLM leaves the arguments to the model.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["list", "dict"]}, "exact": {"type": "boolean"}},
            "required": ["word", "exact"],
            "additionalProperties": False,
        },
    },
}


class Found(pydantic.BaseModel):
    """What the client turns into a schema and reads the answer with."""

    kind: bool


@pytest.fixture(scope="module")
def client(guarded: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=guarded.url + "/v1", api_key=KEYS["alice"], max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(guarded: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=guarded.url + "/v1", api_key=KEYS["bob"], max_retries=0) as client:
        yield client


def test_conversation(client: openai.OpenAI) -> None:
    messages = list(QUESTION)
    for _ in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=8, store=False, metadata={"a": "b"}, user="me"
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": [{"type": "text", "text": "go on"}]},
        ]


def test_stream_with_usage(client: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 12, "temperature": 0}
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_stream_helper(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": QUESTION, "max_tokens": 60, "response_format": Found}

    def attempt(seed: int) -> tuple[set[str], object] | None:
        try:
            with client.chat.completions.stream(**request, seed=seed) as stream:
                kinds = {event.type for event in stream}
            return kinds, stream.get_final_completion().choices[0].message.parsed
        except openai.LengthFinishReasonError:
            return None

    kinds, parsed = until_complete(attempt)
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(parsed, Found)


def call_tool(client: openai.OpenAI, request: dict[str, object]) -> tuple[str, str, str] | None:
    """Id, name and arguments of the call that the model makes; None if it was cut before it had made one."""
    if not request["stream"]:
        calls = client.chat.completions.create(**request).choices[0].message.tool_calls
        return (calls[0].id, calls[0].function.name, calls[0].function.arguments) if calls else None
    chunks = list(client.chat.completions.create(**request))
    if chunks[-1].choices[0].finish_reason == "length":
        return None
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    return calls[0].id, calls[0].function.name, "".join(call.function.arguments or "" for call in calls)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: openai.OpenAI, choice, stream) -> None:
    request = {"model": MODEL, "messages": QUESTION, "tools": [TOOL], "tool_choice": choice, "stream": stream}
    call_id, name, arguments = until_complete(
        lambda seed: call_tool(client, request | {"max_tokens": 200, "seed": seed})
    )
    assert name == "look_up"
    assert json.loads(arguments)["word"] in ("list", "dict")
    # What the tool said goes back into the conversation.
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    answered = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "found"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=answered, tools=[TOOL], tool_choice="none", max_tokens=4
    )
    assert answer.choices[0].message.content is not None


def test_tools_left_to_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[TOOL], max_tokens=8)
    assert answer.choices[0].message.role == "assistant"


def test_json_schema_parsed_into_a_class(client: openai.OpenAI) -> None:
    def attempt(seed: int) -> object | None:
        try:
            answer = client.chat.completions.parse(
                model=MODEL, messages=QUESTION, max_tokens=60, seed=seed, response_format=Found
            )
        except openai.LengthFinishReasonError:
            return None
        return answer.choices[0].message.parsed

    assert isinstance(until_complete(attempt), Found)


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=24, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_logprobs_and_several_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, n=3, seed=1, logprobs=True, top_logprobs=5, stop=["\n\n"]
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert all(len(token.top_logprobs) == 5 for token in choice.logprobs.content)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["import ", "class "], max_tokens=4, n=2, echo=True)
    assert [choice.text.split(" ")[0] for choice in answer.choices] == ["import", "import", "class", "class"]


def test_errors_are_the_clients_own_classes(client: openai.OpenAI, guarded: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="n asks for more than 8"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, n=9)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=QUESTION)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with (
        openai.OpenAI(base_url=guarded.url + "/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def test_asynchronous(async_client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in async_client.models.list()] == [MODEL]
    stream = await async_client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces)
    answer = await async_client.completions.create(model=MODEL, prompt="def ", max_tokens=4)
    assert answer.usage.completion_tokens <= 4


def test_the_requests_id_reaches_the_log(client: openai.OpenAI, guarded: Server) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=4, extra_headers={"X-Request-Id": "conversation-7"}
    )
    assert raw.headers["x-request-id"] == "conversation-7"
    # The line is written when the exchange has ended, which the client may know first.
    guarded.wait_until(lambda: "conversation-7" in guarded.requests_log.read_text(), 10, "the request's line")
    lines = [json.loads(line) for line in guarded.requests_log.read_text().splitlines()]
    (line,) = [line for line in lines if line["id"] == "conversation-7"]
    assert (line["key"], line["status"], line["path"]) == ("alice", 200, "/v1/chat/completions")
    assert line["output_tokens"] <= 4 < line["prompt_tokens"]
    assert line["ttft_seconds"] > 0
    assert "Write Python" not in guarded.requests_log.read_text()
