"""litellm, unmodified."""

import json
import os

import pytest

from tests.e2e.clients.tries import until_complete
from tests.e2e.conftest import KEYS
from tests.e2e.servers import Server

# Or it asks the network for a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm = pytest.importorskip("litellm", reason="litellm is installed by `make test-clients`")

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "import "}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "boolean"}},
    "required": ["kind"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA, "strict": True}}


@pytest.fixture
def server(guarded: Server) -> dict[str, object]:
    return {"model": "openai/demo", "api_base": guarded.url + "/v1", "api_key": KEYS["alice"], "num_retries": 0}


def test_conversation(server) -> None:
    answer = litellm.completion(**server, messages=QUESTION, max_tokens=8, n=2, temperature=1)
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens <= 16


def test_stream(server) -> None:
    chunks = list(litellm.completion(**server, messages=QUESTION, max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def test_asynchronous(server) -> None:
    assert (await litellm.acompletion(**server, messages=QUESTION, max_tokens=4)).choices[0].message.content


def test_tools(server) -> None:
    choice = {"type": "function", "function": {"name": "look_up"}}
    request = {"messages": QUESTION, "max_tokens": 100, "tools": [TOOL], "tool_choice": choice}
    calls = until_complete(
        lambda seed: litellm.completion(**server, **request, seed=seed).choices[0].message.tool_calls
    )
    assert calls[0].function.name == "look_up"


def test_json_schema(server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA, "strict": True}}
    request = {"messages": QUESTION, "max_tokens": 60, "response_format": form}

    def attempt(seed: int) -> str | None:
        choice = litellm.completion(**server, **request, seed=seed).choices[0]
        return choice.message.content if choice.finish_reason == "stop" else None

    assert set(json.loads(until_complete(attempt))) == {"kind"}


def test_text_completion(server) -> None:
    model = server | {"model": "text-completion-openai/demo"}
    assert litellm.text_completion(**model, prompt="def ", max_tokens=4).choices[0].text


def test_errors(server) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**server, messages=QUESTION, n=9)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**server | {"api_key": "wrong"}, messages=QUESTION)
