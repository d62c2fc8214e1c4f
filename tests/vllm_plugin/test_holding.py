"""Decodes that are left out of steps, in real engines: the text is the same."""

import pytest

from sparse_backend.vllm_plugin.batching import SETTINGS_VARIABLE
from tests import families
from tests.vllm_plugin import family_engines, holding
from tests.vllm_plugin.family_engines import Request

pytestmark = pytest.mark.engine

# In pieces of 16, beside the continuations of those before.
PROMPTS = [[5 + row, 6, 7 + row, 8] * (2 + 3 * row) for row in range(6)]
PIECES = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def test_text_is_that_of_steps_that_carry_everything(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("holding")
    families.write(root / "base", "relu-llama")
    monkeypatch.setenv(SETTINGS_VARIABLE, holding.SETTINGS)
    counting = {"prosparse": {"ffn_path": "sparse", "count_rows": True}}
    held = {"scheduler_cls": holding.NAME, "additional_config": counting, **PIECES}

    def request(**options: object) -> Request:
        return Request(str(root / "base"), ["sparse"], PROMPTS, tokens=24, options=options)

    answers = family_engines.run(
        root,
        {
            "vLLM's": request(**PIECES),
            "held": request(**held, async_scheduling=True),
            "held, synchronous": request(**held, async_scheduling=False),
        },
    )
    expected = answers["vLLM's"]["sparse"]
    said = [line for line in (root / "log").read_text().splitlines() if line.startswith("held back")]
    assert len(said) == 2
    for line, name in zip(said, ("held", "held, synchronous"), strict=True):
        answer = answers[name]["sparse"]
        assert answer.tokens == expected.tokens, name
        assert line.endswith("faults {}")
        assert int(line.split()[2]) > 5
        for ours, theirs in zip(answer.snapshot["layers"], expected.snapshot["layers"], strict=True):
            counts, before = (layer["paths"]["sparse"] for layer in (ours, theirs))
            # The same rows, in more steps.
            assert counts["rows"] == before["rows"]
            assert counts["steps"] > before["steps"]
