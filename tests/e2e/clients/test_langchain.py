"""langchain-openai, unmodified."""

import openai
import pydantic
import pytest

from tests.e2e.clients.tries import until_complete
from tests.e2e.conftest import KEYS
from tests.e2e.servers import Server

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is installed by `make test-clients`"
)

pytestmark = pytest.mark.engine


class Found(pydantic.BaseModel):
    """What was found."""

    kind: bool


@pytest.fixture
def chat(guarded: Server):
    return langchain_openai.ChatOpenAI(
        model="demo", base_url=guarded.url + "/v1", api_key=KEYS["alice"], max_tokens=100, max_retries=0
    )


def test_conversation(chat) -> None:
    answer = chat.invoke([("system", "Write Python."), ("user", "def read(path):")])
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 100


def test_stream(chat) -> None:
    assert len(list(chat.stream("import "))) > 2


async def test_asynchronous(chat) -> None:
    answers = await chat.abatch(["import ", "class "])
    assert all(answer.content for answer in answers)


def test_tools(chat) -> None:
    def look_up(exact: bool) -> str:
        """Look it up."""
        return str(exact)

    tools = chat.bind_tools([look_up], tool_choice="look_up", strict=True)
    calls = until_complete(lambda seed: tools.bind(seed=seed).invoke("look it up").tool_calls or None)
    assert calls[0]["name"] == "look_up"


def test_structured_output(chat) -> None:
    def attempt(seed: int) -> object | None:
        try:
            return (
                chat.model_copy(update={"seed": seed})
                .with_structured_output(Found, method="json_schema")
                .invoke("found?")
            )
        except openai.LengthFinishReasonError:
            return None

    assert isinstance(until_complete(attempt), Found)


def test_logprobs(chat) -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("import ")
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
