"""Runs the demo through vLLM engines of many configurations, each in a process of its own, several at a time.

python -m tests.gpu.engines REQUEST.json ANSWER.json     one engine, as the tests start it
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot, merge

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "demo"
TIMEOUT_S = 240
LOAD_TOKENS = 200
AT_A_TIME = max(1, min(8, (os.cpu_count() or 1) // 2))

# vLLM's own MiniCPM class computes FATReLU densely, with its own fused kernel; with these numbers it is a LLaMA.
STOCK_CLASS = {
    "architectures": ["MiniCPMForCausalLM"],
    "scale_emb": 1,
    "scale_depth": 8**0.5,  # the square root of the demo's number of layers
    "dim_model_base": 256,  # the demo's d_model
}
OUR_CLASS = {"architectures": ["SparseLlamaForCausalLM"]}


@dataclass(frozen=True)
class Round:
    """Prompts generated from together."""

    prompts: list[list[int]]
    max_tokens: int


@dataclass(frozen=True)
class EngineConfig:
    """One engine; what is not said here is vLLM's default."""

    ffn_path: str = "sparse"
    stock: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``vllm.LLM``."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """One prompt's continuation."""

    tokens: list[int]
    top: list[list[float]]
    """Per token, the log-probabilities of the two most likely ones, highest first."""
    cached: int
    """Prompt tokens that were not computed, but found in the prefix cache."""


@dataclass(frozen=True)
class Counted:
    """What the counters of a round say; one entry per layer."""

    sparse_rows: list[int]
    dense_rows: list[int]
    active: list[int]


@dataclass(frozen=True)
class Answer:
    """What came of an engine."""

    rounds: list[list[Generated]]
    counted: list[Counted]
    facts: dict[str, Any]
    under_load: list[list[int]]
    """Token rows of each layer of each worker, in snapshots taken without waiting while one prompt is continued."""
    snapshot: SparsitySnapshot
    live_snapshot: SparsitySnapshot
    """As the server takes it: begun, then asked for until it is there."""
    ready_s: float
    total_s: float


def text_tokens() -> list[int]:
    """Python text, such as the demo was trained on: its greedy continuations have few near-ties."""
    text = (ROOT / "sparse_backend" / "checkpoint.py").read_text()
    return list(Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids)


def run_engines(configs: dict[str, EngineConfig], rounds: list[Round]) -> dict[str, Answer | str]:
    """Run every configuration; in place of an answer stands the end of the log of an engine that failed."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_A_TIME) as pool:
        answers = pool.map(lambda item: _run(Path(folder) / item[0], item[1], rounds), configs.items())
        return dict(zip(configs, answers, strict=True))


def _run(folder: Path, config: EngineConfig, rounds: list[Round]) -> Answer | str:
    folder.mkdir()
    (folder / "request.json").write_text(
        json.dumps({"config": dataclasses.asdict(config), "rounds": [dataclasses.asdict(round_) for round_ in rounds]})
    )
    environment = {
        **os.environ,
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        # Engines that compile the same graph at the same time would write the same files.
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        **config.environment,
    }
    command = [sys.executable, "-m", "tests.gpu.engines", str(folder / "request.json"), str(folder / "answer.json")]
    with (folder / "log").open("w") as log:
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return f"{error}\n{(folder / 'log').read_text()[-6000:]}"
    answer = json.loads((folder / "answer.json").read_text())
    generated = [[Generated(**one) for one in round_] for round_ in answer.pop("rounds")]
    return Answer(rounds=generated, counted=[Counted(**one) for one in answer.pop("counted")], **answer)


def _serve(config: EngineConfig, rounds: list[Round]) -> Answer:
    began = time.monotonic()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(DEMO),
        hf_overrides=STOCK_CLASS if config.stock else OUR_CLASS,
        additional_config={} if config.stock else {"prosparse": {"ffn_path": config.ffn_path}},
        worker_extension_cls="tests.gpu.facts.FactsWorkerExtension",
        **{
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": 1 << 28,
            "gpu_memory_utilization": 0.05,
            "enable_prefix_caching": False,
            "seed": 0,
            **config.options,
        },
    )

    def exact() -> SparsitySnapshot:
        return merge(llm.collective_rpc("sparsity_snapshot"))

    facts = llm.collective_rpc("facts")[0]
    facts["async_scheduling"] = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    llm.collective_rpc("sparsity_reset")
    ready = time.monotonic()
    generated, counted, before = [], [], exact()
    for round_ in rounds:
        parameters = SamplingParams(
            temperature=0, max_tokens=round_.max_tokens, ignore_eos=True, detokenize=False, logprobs=2
        )
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in round_.prompts], parameters, use_tqdm=False)
        generated.append(
            [
                Generated(
                    tokens=list(output.outputs[0].token_ids),
                    top=[
                        sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
                        for step in output.outputs[0].logprobs
                    ],
                    cached=output.num_cached_tokens or 0,
                )
                for output in outputs
            ]
        )
        after = exact()
        counted.append(_difference(after, before))
        before = after
    under_load = [] if config.stock else _snapshots_under_load(llm, rounds[0].prompts[0])
    live, end = merge(_live(llm)), time.monotonic()
    return Answer(generated, counted, facts, under_load, exact(), live, ready - began, end - began)


def _live(llm: Any) -> list[SparsitySnapshot]:
    answers = llm.collective_rpc("sparsity_snapshot_begin")
    while None in answers:
        answers = llm.collective_rpc("sparsity_snapshot_poll")
    return answers


def _snapshots_under_load(llm: Any, prompt: list[int]) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=LOAD_TOKENS, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("load", {"prompt_token_ids": prompt}, parameters)
    rows = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        rows.append(
            [
                sum(counts["rows"] for counts in layer["paths"].values())
                for worker in _live(llm)
                for layer in worker["layers"]
            ]
        )
    return rows


def _difference(after: SparsitySnapshot, before: SparsitySnapshot) -> Counted:
    def grown(path: str, kind: str) -> list[int]:
        pairs = zip(after["layers"], before["layers"], strict=True)
        return [now["paths"][path][kind] - then["paths"][path][kind] for now, then in pairs]

    active = zip(grown("sparse", "active"), grown("dense", "active"), strict=True)
    return Counted(grown("sparse", "rows"), grown("dense", "rows"), [sparse + dense for sparse, dense in active])


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = _serve(EngineConfig(**request["config"]), [Round(**round_) for round_ in request["rounds"]])
    Path(sys.argv[2]).write_text(json.dumps(dataclasses.asdict(answer)))
