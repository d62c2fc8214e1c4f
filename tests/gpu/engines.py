"""Runs the demo through vLLM engines of many configurations, each in a process of its own, several at a time.

python -m tests.gpu.engines REQUEST.json ANSWER.json     one engine, as the tests start it
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenizers import Tokenizer

from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot, merge

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "demo"
TIMEOUT_S = 180
WORD_EVERY_S = 15
LOAD_TOKENS = 200
AT_A_TIME = max(1, min(8, len(os.sched_getaffinity(0)) // 2))

# vLLM's own MiniCPM class computes FATReLU densely, with its own fused kernel; with these numbers it is a LLaMA.
STOCK_CLASS = {
    "architectures": ["MiniCPMForCausalLM"],
    "scale_emb": 1,
    "scale_depth": 8**0.5,  # the square root of the demo's number of layers
    "dim_model_base": 256,  # the demo's d_model
}
OUR_CLASS = {"architectures": ["SparseLlamaForCausalLM"]}

COMMAND = [sys.executable, "-m", "tests.gpu.engines"]

_FIRST_ERROR = re.compile(r"Traceback .*?^([^\n]*\w(?:Error|Exception)(?:: [^\n]*)?)$", re.MULTILINE | re.DOTALL)


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
    ours: dict[str, Any] = field(default_factory=dict)
    """Further settings of our plugin."""


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


class EngineError(Exception):
    """Why there is no answer, and where the engine's log is."""


class Engines:
    """Engines at work in the background, in the order given; each is waited for only when its answer is asked for.

    A context manager: at its end the engines that still run are ended.
    """

    def __init__(self, folder: Path, configs: dict[str, EngineConfig], rounds: list[Round]) -> None:
        """``folder``: empty; keeps the engines' logs."""
        self._folder, self._rounds = folder, rounds
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self._answers = {name: self._pool.submit(self._run, name, config) for name, config in configs.items()}

    def answer(self, name: str) -> Answer:
        """What came of an engine; waits for it, and now and then prints what the engines are at (see it with pytest -s).

        Raises:
            EngineError: the engine did not start, died, or took more than ``TIMEOUT_S``.
        """
        while wait([self._answers[name]], WORD_EVERY_S).not_done:
            for other in list(self._running):
                lines = self._log(other).split("\n")
                print(f"  {other}: {next((line for line in reversed(lines) if line.strip()), '')[-150:]}", flush=True)
        return self._answers[name].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running.values()):
            _kill(process)
        self._pool.shutdown()

    def _run(self, name: str, config: EngineConfig) -> Answer:
        folder = self._folder_of(name)
        folder.mkdir()
        request, answer = folder / "request.json", folder / "answer.json"
        request.write_text(
            json.dumps(
                {
                    "config": dataclasses.asdict(config),
                    "rounds": [dataclasses.asdict(round_) for round_ in self._rounds],
                }
            )
        )
        environment = {
            **os.environ,
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            # Each would else take a thread per core of the machine for itself.
            "OMP_NUM_THREADS": "2",
            # Engines that compile the same graph at the same time would write the same files.
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            **config.environment,
        }
        if importlib.util.find_spec("flashinfer") is None:
            # vLLM takes it for granted on a GPU, and dies without it.
            environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        began = time.monotonic()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*COMMAND, str(request), str(answer)], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._running[name] = process
        print(f"{name}: started", flush=True)
        try:
            status = f"exit status {process.wait(TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            status = "too slow, killed"
            _kill(process)
        finally:
            del self._running[name]
        took = f"after {time.monotonic() - began:.0f} s"
        if status != "exit status 0":
            text = self._log(name)
            # What vLLM's processes say last is only that another one died: the first error is the cause.
            cause = _FIRST_ERROR.search(text)
            reason = f"{status} {took}: {cause[1] if cause else 'no error in its log'}"
            print(f"{name}: FAILED, {reason}\n{text[-3000:]}", flush=True)
            raise EngineError(f"the engine {name!r} failed, {reason}\nsee {folder / 'log'}")
        print(f"{name}: done {took}", flush=True)
        return _read_answer(answer)

    def _folder_of(self, name: str) -> Path:
        # Compilers are called with paths in it, and not all callers quote them.
        return self._folder / re.sub(r"\W+", "-", name)

    def _log(self, name: str) -> str:
        return (self._folder_of(name) / "log").read_text(errors="replace").replace("\r", "\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End an engine's process and those that it started, which would else keep the GPU's memory."""
    import psutil  # comes with vLLM

    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for one in (*started, process):
        one.kill()
    process.wait()


def _read_answer(file: Path) -> Answer:
    answer = json.loads(file.read_text())
    generated = [[Generated(**one) for one in round_] for round_ in answer.pop("rounds")]
    return Answer(rounds=generated, counted=[Counted(**one) for one in answer.pop("counted")], **answer)


def _serve(config: EngineConfig, rounds: list[Round]) -> Answer:
    began = time.monotonic()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(DEMO),
        hf_overrides=STOCK_CLASS if config.stock else OUR_CLASS,
        additional_config={} if config.stock else {"prosparse": {"ffn_path": config.ffn_path, **config.ours}},
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
