"""A vLLM engine in a process of its own, so that two of them (one per path) can be measured or compared side by side."""

import contextlib
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
from torch import distributed

from sparse_backend.bench.environment import defaults_in_environment
from sparse_backend.bench.recording import LayerRecount
from sparse_backend.bench.synthetic_loader import load_arguments
from sparse_backend.bench.synthetic_model import SyntheticModel
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot, merge

# A benchmark's output is its table: what vLLM and torch say while they start would bury it.
_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library.triton",
    "TQDM_DISABLE": "1",
    # What an engine that is ended while it starts leaves behind.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}


@dataclass(frozen=True)
class Generation:
    """What one prompt continued with."""

    tokens: list[int]
    top_logprobs: list[list[float]]
    """Per generated token, the log-probabilities of the two most likely tokens, highest first; empty unless asked for."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is set up; everything else is vLLM's default."""

    ffn_path: str
    dtype: str = "auto"
    eager: bool = False
    max_num_seqs: int = 64
    stock: bool = False
    """Run vLLM's own LLaMA class with Swish on the same weights: other text, the same shapes, vLLM's own dense kernels."""
    quantization: str | None = None
    """One of vLLM's, such as "fp8"; for ``stock`` only."""
    synthetic: SyntheticModel | None = None
    """Make these weights in place of loading the folder's."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None takes the checkpoint's."""
    kv_cache_bytes: int = 1 << 30
    tensor_parallel_size: int = 1
    """Devices that share each layer's neurons and heads."""
    gpu_share: float | None = None
    """Share of the GPU's memory that must be free for this engine when it starts; None takes vLLM's default."""


class Engine:
    """Handle on the process; a context manager that ends it.

    Raises (from every method): RuntimeError with the traceback of the other process if it failed there; UserError if the process
    ended.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        dtype = checkpoint.engine_dtype(options.dtype, float16=torch.cuda.is_available())
        options = replace(options, dtype=dtype)
        self._process = context.Process(
            target=_serve,
            args=(theirs, str(checkpoint.folder), checkpoint.model_class, options),
            # A daemon may not start the processes that tensor parallelism takes. They end with the one that started them.
            daemon=options.tensor_parallel_size == 1,
        )
        self._ready = False
        # torch reads some of them on import, before any line of ours runs in the new process.
        with defaults_in_environment(_QUIET):
            self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Return once the model is loaded and compiled.

        Raises:
            UserError: vLLM refuses the checkpoint or the options, has no room for them, or is not installed completely.
        """
        refusal = self._receive()
        if refusal is not None:
            raise UserError(refusal)
        self._ready = True

    def generate(
        self, prompts: list[list[int]], max_tokens: int, *, top_logprobs: bool = False
    ) -> tuple[list[Generation], float]:
        """Continue token-id prompts greedily, all at once, for exactly ``max_tokens``; also the seconds it took."""
        return self._call("generate", prompts, max_tokens, top_logprobs)

    def snapshot(self) -> SparsitySnapshot:
        """The layers' counters."""
        return self._call("snapshot")

    def start_recording(self) -> None:
        """Keep what the feed-forward layers are given from now on. Needs an eager engine."""
        self._call("start_recording")

    def stop_recording(self) -> list[LayerRecount]:
        """Stop, and return what was recorded, counted again."""
        return self._call("stop_recording")

    def _call(self, method: str, *arguments: Any) -> Any:
        # A process that has ended takes nothing; receiving tells how it ended.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            raise UserError(
                f"The engine's process ended with exit code {self._process.exitcode}. -9 means killed, as when memory runs out."
            ) from None
        if failed:
            raise RuntimeError(f"in the engine process:\n{value}")
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if self._ready:
            self._process.join(20)
        # One that is still starting would only notice once it is ready.
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class _EngineServer:
    """The other side: runs in the spawned process, owns the vLLM engine."""

    def __init__(self, folder: str, model_class: str, options: EngineOptions) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
        from vllm import LLM

        settings: dict[str, Any] = {"ffn_path": options.ffn_path}
        extra: dict[str, Any] = {}
        if options.synthetic:
            settings["densities"] = options.synthetic.layer_densities()
            extra |= load_arguments(options.synthetic)
        if options.gpu_share:
            extra["gpu_memory_utilization"] = options.gpu_share
        overrides = (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
            if options.stock
            else {"architectures": [model_class]}
        )
        self._llm = LLM(
            model=folder,
            dtype=options.dtype,
            enforce_eager=options.eager,
            hf_overrides=overrides,
            additional_config={"prosparse": settings},
            worker_extension_cls="sparse_backend.bench.recording.RecordingWorkerExtension",
            tensor_parallel_size=options.tensor_parallel_size,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            quantization=options.quantization,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            enable_prefix_caching=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
            **extra,
        )
        self._llm.collective_rpc("sparsity_reset")

    def generate(self, prompts: list[list[int]], max_tokens: int, top_logprobs: bool) -> tuple[list[Generation], float]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=2 if top_logprobs else None,
        )
        start = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        generations = []
        for output in outputs:
            completion = output.outputs[0]
            top = [
                sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
                for step in completion.logprobs or []
            ]
            generations.append(Generation(list(completion.token_ids), top))
        return generations, seconds

    def snapshot(self) -> SparsitySnapshot:
        return merge(self._llm.collective_rpc("sparsity_snapshot"))

    def start_recording(self) -> None:
        self._llm.collective_rpc("start_recording")

    def stop_recording(self) -> list[LayerRecount]:
        return self._llm.collective_rpc("stop_recording")[0]


def _refusal(error: Exception) -> str:
    """What the user is told when vLLM does not start."""
    if isinstance(error, ImportError):
        return (
            f"vLLM cannot start, its installation is incomplete: {error}. Install vLLM with all that it depends on:"
            " `make install` does, on a GPU machine with DEVICE=cuda."
        )
    return f"vLLM cannot run this model so: {_last_line(error)}"


def _last_line(error: Exception) -> str:
    """What an exception says in the end; pydantic appends an address to that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("For further information")), repr(error))


def _serve(connection: Connection, folder: str, model_class: str, options: EngineOptions) -> None:
    # The other side may go away at any time, and then there is nobody left to tell anything.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _answer(connection, folder, model_class, options)
    # torch complains at exit about groups that are still there.
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _answer(connection: Connection, folder: str, model_class: str, options: EngineOptions) -> None:
    """Say that the engine is ready, or why not; then answer calls until the other side hangs up, which raises."""
    try:
        server = _EngineServer(folder, model_class, options)
    except Exception as error:
        connection.send((False, _refusal(error)))
        return
    connection.send((False, None))
    while True:
        method, arguments = connection.recv()
        try:
            answer = (False, getattr(server, method)(*arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        connection.send(answer)
