"""The same few tokens, greedily, from Hugging Face's implementation and over HTTP."""

import torch

from tests.e2e.servers import Server

TOKENS = 8


def from_model(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """What ``model`` goes on with."""
    with torch.no_grad():
        sequence = list(prompt)
        for _ in range(TOKENS):
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def from_server(server: Server, prompt: list[int], name: str = "model") -> list[int]:
    """What the server goes on with for a request whose ``model`` is ``name``."""
    body = {
        **{"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0},
        **{"ignore_eos": True, "return_token_ids": True},
    }
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]
