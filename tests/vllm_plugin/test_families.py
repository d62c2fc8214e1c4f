"""Every family through vLLM on both paths, against its Hugging Face implementation in float32."""

import pytest
import torch
from transformers import PreTrainedModel

from tests import families
from tests.families import FAMILIES
from tests.vllm_plugin import family_engines
from tests.vllm_plugin.family_engines import Answer, Request

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, PreTrainedModel]]:
    root = tmp_path_factory.mktemp("families")
    return {name: (str(root / name), families.write(root / name, name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def answers(references, tmp_path_factory) -> dict[str, dict[str, Answer]]:
    requests = {name: Request(folder) for name, (folder, _) in references.items()}
    return family_engines.run(tmp_path_factory.mktemp("engines"), requests)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_hugging_face(references, answers, name, path):
    request, answer, model = Request(""), answers[name][path], references[name][1]
    for prompt, tokens, logits in zip(request.prompts, answer.tokens, answer.logits, strict=True):
        expected_tokens, expected = families.greedy(model, prompt, request.tokens)
        assert tokens == expected_tokens
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    rows = sum(map(len, request.prompts)) + len(request.prompts) * (request.tokens - 1)
    for layer in answer.snapshot["layers"]:
        assert layer["paths"][path]["rows"] == rows
        assert sum(counts["rows"] for counts in layer["paths"].values()) == rows
        assert layer["dense_reason"] == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_both_paths_count_the_same_neurons(answers, name):
    for sparse, dense in zip(*(answers[name][path].snapshot["layers"] for path in ("sparse", "dense")), strict=True):
        active = sparse["paths"]["sparse"]["active"]
        assert 0 < active < sparse["paths"]["sparse"]["rows"] * sparse["d_ff"]
        # A gate on the threshold may fall to either side.
        assert active == pytest.approx(dense["paths"]["dense"]["active"], rel=1e-3)
