"""LoRA adapters and quantised layers give what vLLM's own class gives, computed densely; speculated rows take the sparse path."""

import pytest
import torch

from tests import families
from tests.adapters import write_adapter, write_int8_copy
from tests.vllm_plugin import family_engines
from tests.vllm_plugin.family_engines import Answer, Request

pytestmark = pytest.mark.engine

# vLLM's own MiniCPM class computes FATReLU densely; with these numbers it is a LLaMA.
STOCK = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.0,
    "scale_emb": 1,
    "scale_depth": 2**0.5,  # the square root of the number of layers
    "dim_model_base": 64,  # d_model
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# What is looked up is in the prompt already.
REPEATING = [[5, 6, 7, 8] * 8, [40, 41, 42] * 8]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Answer]]:
    root = tmp_path_factory.mktemp("fallbacks")
    base = root / "base"
    families.write(base, "relu-llama")
    everything = {
        "adapter": str(write_adapter(root / "everything", base, [*ATTENTION, *MLP])),
        "options": {"enable_lora": True, "max_lora_rank": 8},
    }
    attention = {
        "adapter": str(write_adapter(root / "attention", base, ["q_proj", "v_proj"])),
        "options": {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ATTENTION},
    }
    quantised = str(write_int8_copy(root / "int8", base, ignored=["model.layers.0.mlp."]))
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    requests = {
        "plain": Request(str(base), ["sparse"]),
        "lora everywhere": Request(str(base), ["sparse"], **everything),
        "lora everywhere, stock": Request(str(base), ["stock"], stock=STOCK, **everything),
        "lora in attention": Request(str(base), ["sparse"], **attention),
        "lora in attention, stock": Request(str(base), ["stock"], stock=STOCK, **attention),
        "quantised": Request(quantised, ["sparse"], options={"dtype": "bfloat16"}),
        "quantised, stock": Request(quantised, ["stock"], stock=STOCK, options={"dtype": "bfloat16"}),
        "repeating": Request(str(base), ["sparse"], REPEATING, tokens=24),
        "repeating, speculated": Request(
            str(base), ["sparse"], REPEATING, tokens=24, options={"speculative_config": ngram}
        ),
    }
    return family_engines.run(root, requests)


def rows(answer: Answer, path: str) -> list[int]:
    return [layer["paths"][path]["rows"] for layer in answer.snapshot["layers"]]


def expected_rows(request: Request) -> int:
    return sum(map(len, request.prompts)) + len(request.prompts) * (request.tokens - 1)


@pytest.mark.parametrize("where", ["everywhere", "in attention"])
def test_an_adapter_gives_what_vllms_own_class_gives(answers, where):
    ours, stock = answers[f"lora {where}"]["sparse"], answers[f"lora {where}, stock"]["stock"]
    assert ours.tokens == stock.tokens
    for logits, expected in zip(ours.logits, stock.logits, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert ours.tokens != answers["plain"]["sparse"].tokens


def test_layers_with_adapters_are_computed_and_counted_densely(answers):
    ours = answers["lora everywhere"]["sparse"]
    assert [layer["dense_reason"] for layer in ours.snapshot["layers"]] == ["lora", "lora"]
    assert rows(ours, "dense") == [expected_rows(Request(""))] * 2
    assert rows(ours, "sparse") == [0, 0]


def test_adapters_that_leave_the_feed_forward_layers_alone_leave_them_sparse(answers):
    ours = answers["lora in attention"]["sparse"]
    assert [layer["dense_reason"] for layer in ours.snapshot["layers"]] == ["", ""]
    assert rows(ours, "sparse") == [expected_rows(Request(""))] * 2
    assert rows(ours, "dense") == [0, 0]


def test_quantised_layers_are_computed_densely_and_the_others_are_not(answers):
    ours, stock = answers["quantised"]["sparse"], answers["quantised, stock"]["stock"]
    assert [layer["dense_reason"] for layer in ours.snapshot["layers"]] == ["", "quantization"]
    assert rows(ours, "sparse") == [expected_rows(Request("")), 0]
    assert rows(ours, "dense") == [0, expected_rows(Request(""))]
    # The first tokens' logits: later ones follow from a choice that rounding, to bfloat16 and of inputs to int8, may tip.
    for logits, expected in zip(ours.logits, stock.logits, strict=True):
        assert (logits[0] - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()


def test_speculated_tokens_are_the_same_and_are_verified_on_the_sparse_path(answers):
    plain, speculated = answers["repeating"]["sparse"], answers["repeating, speculated"]["sparse"]
    assert speculated.tokens == plain.tokens
    for before, after in zip(plain.snapshot["layers"], speculated.snapshot["layers"], strict=True):
        assert not after["paths"]["dense"]["rows"]
        few, many = before["paths"]["sparse"], after["paths"]["sparse"]
        # Several rows of a sequence in a step, and fewer steps.
        assert many["rows"] > few["rows"]
        assert many["steps"] < few["steps"]
        assert many["union"] < many["active"]
