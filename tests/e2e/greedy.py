"""The same few tokens, greedily, from Hugging Face's implementation and over HTTP."""

from transformers import PreTrainedModel

from tests import families
from tests.e2e.servers import Server

TOKENS = 8


def from_model(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """What ``model`` goes on with."""
    return families.greedy(model, prompt, TOKENS)[0]


def from_server(server: Server, prompt: list[int], name: str = "model") -> list[int]:
    """What the server goes on with for a request whose ``model`` is ``name``."""
    body = {
        **{"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0},
        **{"ignore_eos": True, "return_token_ids": True},
    }
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]
