"""Checkpoints of several families through vLLM engines, one after the other in one process: starting one each would take minutes.

python -m tests.vllm_plugin.family_engines REQUEST.json ANSWER.pt
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot


@dataclass(frozen=True)
class Request:
    """One engine."""

    folder: str
    paths: list[str] = field(default_factory=lambda: ["sparse", "dense"])
    """What is generated with: each path in turn."""
    prompts: list[list[int]] = field(default_factory=lambda: [[5, 6, 7, 8], [40, 41, 42], [200, 12] * 12])
    tokens: int = 12
    stock: dict[str, Any] = field(default_factory=dict)
    """vLLM's own class instead of ours: overrides of the config."""
    adapter: str | None = None
    """Folder of a LoRA adapter that all prompts are continued with."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM``."""


@dataclass(frozen=True)
class Answer:
    """What one path gave."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    """Per prompt [tokens, vocabulary]: those that each token was chosen from."""
    snapshot: SparsitySnapshot | None


def run(folder: Path, requests: dict[str, Request]) -> dict[str, dict[str, Answer]]:
    """Each request's answers by path. What the engines say is in ``folder``/log."""
    request, answer = folder / "request.json", folder / "answer.pt"
    request.write_text(json.dumps({name: asdict(one) for name, one in requests.items()}))
    command = [sys.executable, "-m", "tests.vllm_plugin.family_engines", str(request), str(answer)]
    with (folder / "log").open("wb") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    assert status == 0, (folder / "log").read_text()[-6000:]
    return torch.load(answer, weights_only=False)


def _serve(request: Request) -> dict[str, Answer]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    from sparse_backend.checkpoint import Checkpoint

    overrides = request.stock or {"architectures": [Checkpoint.open(request.folder).model_class]}
    llm = LLM(
        model=request.folder,
        hf_overrides=overrides,
        worker_extension_cls="sparse_backend.vllm_plugin.worker.SparsityWorkerExtension",
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_seqs": 8,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logits",
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "additional_config": {"prosparse": {"ffn_path": "sparse"}},
            "seed": 0,
            **request.options,
        },
    )
    parameters = SamplingParams(
        temperature=0, max_tokens=request.tokens, ignore_eos=True, detokenize=False, logprobs=-1
    )
    adapter = LoRARequest("adapter", 1, request.adapter) if request.adapter else None
    answers = {}
    for path in request.paths:
        if path == "dense":
            llm.apply_model(_take_dense_path)
        llm.collective_rpc("sparsity_reset")
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in request.prompts],
            parameters,
            use_tqdm=False,
            lora_request=adapter,
        )
        completions = [output.outputs[0] for output in outputs]
        answers[path] = Answer(
            [list(completion.token_ids) for completion in completions],
            [
                torch.tensor([[step[token].logprob for token in sorted(step)] for step in completion.logprobs])
                for completion in completions
            ],
            None if request.stock else llm.collective_rpc("sparsity_snapshot")[0],
        )
    del llm
    cleanup_dist_env_and_memory()
    return answers


def _take_dense_path(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.max_sparse_rows = 0


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    requests = {name: Request(**one) for name, one in json.loads(Path(sys.argv[1]).read_text()).items()}
    import vllm  # noqa: F401 - what it brings need not be looked through at each engine's end

    gc.collect()
    gc.freeze()
    # The same class under the name that whoever reads the file knows it by.
    from tests.vllm_plugin import family_engines

    torch.save({name: family_engines._serve(request) for name, request in requests.items()}, sys.argv[2])
