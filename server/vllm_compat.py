"""The one module that touches the internals of vLLM's server (0.32.x): flags, engine client, routers, app state.

Importing it imports vLLM, which takes seconds and reads the environment: ``prepare_environment`` goes first.
"""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sysconfig
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from itertools import pairwise
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, cast

import psutil
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs
from vllm.entrypoints.openai.chat_completion import api_router as chat_completion
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.entrypoints.serve.instrumentator import basic, offline_docs
from vllm.entrypoints.serve.tokenize import api_router as tokenize
from vllm.exceptions import GenerationError, GracefulHTTPError, RetryableRequestError, VLLMClientError
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as VLLM_VERSION

from server.cli import nearest
from server.errors import INTERNAL_TEXTS, RETRY_AFTER, error_body, error_response
from server.openapi import document_served_fields
from server.paths import API_PATHS
from server.progress import say
from server.record import RequestRecord, current_request
from server.settings import Settings
from server.watchdog import Watchdog
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.batching import SCHEDULER
from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot, merge

__all__ = ["Engine", "attach", "get_prometheus_registry", "parse_flags"]

logger = logging.getLogger(__name__)

# Bytes of key-value cache on a CPU unless the user says otherwise: vLLM's own default is most of the machine's memory.
_CPU_KV_CACHE_BYTES = 1 << 30

# Numbers of rows that CUDA graphs are captured for: up to 512 those of vLLM's default, which ends there (on Blackwell at 1024),
# then fewer. A step without one keeps the host for some 30 ms, in which an H200 reads 1500 tokens for a 7B model, one with it for
# 13: docs/results/h200-2026-11-29-batching.md.
_GRAPH_ROWS = (1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, 1024, 64), *range(1024, 2049, 128))

# Characters of a field's name and of what is wrong with it that a client is shown.
_LONGEST_FIELD = 128
_LONGEST_MESSAGE = 512

_SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - where Linux shows shared memory; nothing is written there by name

# Seconds the engine gets to stop by itself before it is killed.
_STOP_TIMEOUT = 10

# Seconds between questions whether a GPU has copied the counters, which takes it no longer than the steps it has in hand.
_SNAPSHOT_INTERVAL = 0.01


class _FlagParser(FlexibleArgumentParser):
    """vLLM's own parser, but a mistake is a ``UserError``."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UserError(f"vLLM cannot use the flags after `--`: {' '.join(message.split())}.")
        word = unknown.split()[0].split("=", 1)[0]
        known = [option for action in self._actions for option in action.option_strings]
        raise UserError(
            f"vLLM {VLLM_VERSION} has no flag {word}{nearest(word, known)}. It was given after `--`, which is for"
            " vLLM's own flags."
        )


def parse_flags(settings: Settings, checkpoint: Checkpoint) -> Namespace:
    """vLLM's argument namespace from the settings and the user's vLLM flags.

    Raises:
        UserError: a flag is unknown, has a value vLLM refuses, or asks for what the checkpoint or this machine cannot do.
    """
    parser = _FlagParser(prog="vLLM", allow_abbrev=False)
    BaseFrontendArgs.add_cli_args(parser)
    AsyncEngineArgs.add_cli_args(parser)
    arguments = parser.parse_args(list(settings.vllm_flags))
    longest = checkpoint.context_length
    if arguments.max_model_len is not None and arguments.max_model_len > longest:
        raise UserError(
            f"--max-model-len {arguments.max_model_len} is longer than the {longest} tokens"
            f" (max_position_embeddings) that {checkpoint.folder} was made for. Give at most that, or leave it out."
        )
    _check_neurons_per_rank(arguments.tensor_parallel_size, checkpoint)
    if arguments.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
        raise UserError(
            "cudagraph_mode FULL (after `--`) puts the attention of mixed steps, prefill beside decoding, into CUDA graphs, and"
            f" vLLM {VLLM_VERSION} then gives wrong text with FlashAttention 3. Leave it out (FULL_AND_PIECEWISE), or give"
            " FULL_DECODE_ONLY."
        )
    if settings.dtype == "float16" and current_platform.is_cpu():
        raise UserError(
            "--dtype float16 needs a GPU: on a CPU we compute in bfloat16 or float32. Give one of these, or leave it out."
        )
    arguments.model = str(checkpoint.folder)
    arguments.served_model_name = [settings.model_name]
    arguments.dtype = checkpoint.engine_dtype(settings.dtype, float16=not current_platform.is_cpu())
    arguments.hf_overrides = {"architectures": [checkpoint.model_class]}
    # Ours is vLLM's asynchronous scheduler, which sends stages of a pipeline what they have no tokens for yet.
    ours_schedules = arguments.pipeline_parallel_size == 1
    if settings.batching == "sparse" and not ours_schedules:
        raise UserError("--batching sparse does not work with --pipeline-parallel-size. Leave one of them out.")
    if settings.step_log is not None and not ours_schedules:
        raise UserError("--step-log does not work with --pipeline-parallel-size. Leave one of them out.")
    arguments.additional_config = {"prosparse": {"ffn_path": settings.ffn_path, "count_rows": ours_schedules}}
    arguments.scheduler_cls = SCHEDULER if ours_schedules else None
    if settings.batching == "sparse" and arguments.enable_chunked_prefill is False:
        raise UserError(
            "--batching sparse reads prompts in pieces, which --no-enable-chunked-prefill forbids. Leave one of them out."
        )
    arguments.worker_extension_cls = "sparse_backend.vllm_plugin.worker.SparsityWorkerExtension"
    if settings.max_tokens is not None:
        # What stops an answer whose request names no number; our policy refuses those that name a larger one.
        arguments.override_generation_config = {
            **arguments.override_generation_config,
            "max_new_tokens": settings.max_tokens,
        }
    arguments.max_logprobs = max(arguments.max_logprobs, settings.max_logprobs)
    arguments.use_tqdm_on_load = settings.log_level in ("debug", "info")
    if current_platform.is_cpu():
        _set_cpu_defaults(arguments)
    elif current_platform.is_cuda():
        _set_gpu_defaults(arguments)
    return cast(Namespace, arguments)


def _check_neurons_per_rank(ranks: int, checkpoint: Checkpoint) -> None:
    """The model class refuses this too, but in a process of its own, where the reason would drown."""
    d_ff = checkpoint.config["intermediate_size"]
    if ranks > 1 and d_ff % (8 * ranks):
        raise UserError(
            f"--tensor-parallel-size {ranks} would give each rank {d_ff / ranks:g} of the {d_ff} neurons (intermediate_size) of"
            f" a layer, but the kernels take multiples of 8. Give a number that divides {d_ff // 8}."
        )


def _set_gpu_defaults(arguments: Namespace) -> None:
    compilation = arguments.compilation_config
    chosen = (
        arguments.cudagraph_capture_sizes,
        arguments.max_cudagraph_capture_size,
        compilation.cudagraph_capture_sizes,
        compilation.max_cudagraph_capture_size,
        # Must be among the sizes.
        compilation.compile_sizes,
        # vLLM's default has sizes that go with speculation; so has "interactivity".
        arguments.speculative_config,
        arguments.spec_method,
        arguments.spec_model,
        arguments.spec_tokens,
    )
    if all(choice is None for choice in chosen) and arguments.performance_mode != "interactivity":
        # As vLLM's default has them: a full batch of decodes, and a full step.
        full = (arguments.max_num_seqs, arguments.max_num_batched_tokens)
        sizes = {*_GRAPH_ROWS, *(rows for rows in full if rows is not None and rows <= _GRAPH_ROWS[-1])}
        most = arguments.max_num_batched_tokens or _GRAPH_ROWS[-1]
        arguments.cudagraph_capture_sizes = sorted(rows for rows in sizes if rows <= most)


def _set_cpu_defaults(arguments: Namespace) -> None:
    if arguments.kv_cache_memory_bytes is None:
        arguments.kv_cache_memory_bytes = _CPU_KV_CACHE_BYTES
    # vLLM 0.32 cannot load the ahead-of-time artifacts that it writes on a CPU: it compiles again, with a warning.
    # Without them, later starts find the inductor's own cache.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    # oneDNN, and torch in front of it, keep a compiled product for each number of tokens that a step had, a megabyte in all, and
    # 1024 products each. As many as this are as fast: docs/results/trust-2026-11-27.md.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    if not arguments.enforce_eager and not _can_compile():
        say("no C++ compiler or no Python.h (python3-dev): the model runs uncompiled, which is slower")
        arguments.enforce_eager = True
    if arguments.enforce_eager:
        # Nor is what vLLM's sampler compiles whatever the flags say.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if arguments.pipeline_parallel_size > 1 and arguments.enforce_eager:
        raise UserError(
            f"--pipeline-parallel-size {arguments.pipeline_parallel_size} on a CPU needs the compiled model: vLLM {VLLM_VERSION}"
            " dies of it uncompiled. Leave --enforce-eager out, and install g++ and python3-dev if they are missing."
        )
    local_replicas = arguments.data_parallel_size_local or arguments.data_parallel_size
    workers = local_replicas * arguments.tensor_parallel_size * arguments.pipeline_parallel_size
    if workers > 1:
        # vLLM's own default is a NUMA node for each, and to die where there are not enough of them.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _share_cores(sorted(os.sched_getaffinity(0)), workers))


def _share_cores(cores: list[int], workers: int) -> str:
    """Cores of each worker, as vLLM reads them: "0,1|2,3"; with more workers than cores some have the same one."""
    bounds = [len(cores) * index // workers for index in range(workers + 1)]
    shares = [cores[first : max(end, first + 1)] for first, end in pairwise(bounds)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _can_compile() -> bool:
    """Is there what torch.compile needs on a CPU? vLLM does not look, and dies in the worker where it is missing."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


class _WatchedLLM(AsyncLLM):
    """vLLM's engine client; what each request generates is noted in its record, and failures are told in fixed texts."""

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's.

        Raises:
            RetryableRequestError: the engine ended.
            GenerationError: the engine failed; the log has the cause.
        """
        tally = _Tally(current_request.get(None))
        try:
            async with contextlib.aclosing(super().generate(*args, **kwargs)) as outputs:
                async for output in outputs:
                    tally.add(output)
                    yield output
        except (VLLMClientError, GracefulHTTPError):
            raise
        except EngineDeadError:
            raise RetryableRequestError(INTERNAL_TEXTS[503]) from None
        except Exception as error:
            logger.exception("a request failed in the engine")
            raise GenerationError(INTERNAL_TEXTS[500]) from error


class _Tally:
    """Adds one prompt's outputs up in the record of their request."""

    def __init__(self, record: RequestRecord | None) -> None:
        self._record = record
        self._lengths: dict[int, int] = {}

    def add(self, output: RequestOutput) -> None:
        record = self._record
        if record is None:
            return
        if not self._lengths:
            record.prompt_tokens += len(output.prompt_token_ids or ())
        for sequence in output.outputs:
            new = len(sequence.token_ids)
            self._lengths[sequence.index] = self._lengths.get(sequence.index, 0) + new
            record.output_tokens += new
            record.longest_output = max(record.longest_output, self._lengths[sequence.index])
        if (stats := output.metrics) is not None and stats.first_token_ts:
            record.first_token_at = min(record.first_token_at or stats.first_token_ts, stats.first_token_ts)
            record.last_token_at = max(record.last_token_at or 0.0, stats.last_token_ts)


def _step_reporter(report: Callable[[], None]) -> Callable[..., StatLoggerBase]:
    """A "stat logger" that passes each step of the engine on, also those that bring no token."""

    class StepReporter(StatLoggerBase):
        def __init__(self, vllm_config: object, engine_index: int = 0) -> None:
            pass

        def record(self, *args: object, **kwargs: object) -> None:
            report()

        def log_engine_initialized(self) -> None:
            pass

    return StepReporter


class Engine:
    """vLLM's engine, running in processes of its own."""

    def __init__(self, arguments: Namespace) -> None:
        """Start the engine and wait until it is up: tens of seconds, so call it in a thread of its own.

        Raises:
            UserError: vLLM refuses the configuration.
            Exception: whatever vLLM raises when the engine cannot start; its processes are gone then.
        """
        self.arguments = arguments
        try:
            config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
        except ValueError as error:
            raise UserError(f"vLLM refuses the configuration: {' '.join(str(error).split())}") from None
        with _children_ignore_interrupt():
            self._llm = _WatchedLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[_step_reporter(self._step)],
                enable_log_requests=arguments.enable_log_requests,
                disable_log_stats=arguments.disable_log_stats,
            )
        self._watchdog = Watchdog(self._busy, self._ask)
        self._processes = _family(self._llm.engine_core.resources.engine_manager.processes)
        self._shared_memory = _shared_memory(self._processes)

    @property
    def model_name(self) -> str:
        """What clients give as ``model``."""
        return str(self.arguments.served_model_name[0])

    @property
    def max_sequences(self) -> int:
        """Sequences it computes at once, all replicas together."""
        config = self._llm.vllm_config
        return int(config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._llm.model_config.max_model_len)

    @property
    def died(self) -> bool:
        """True once the engine's processes are gone or gave up."""
        return bool(self._llm.errored)

    def stalled(self) -> float:
        """Seconds for which it has owed a step or an answer."""
        return self._watchdog.stalled()

    def tick(self) -> None:
        """To be called about once a second: asks a quiet engine whether it is alive."""
        self._watchdog.tick()

    async def warm_up(self) -> None:
        """Have the workers compile what vLLM would compile at the first request that needs it."""
        await self._ask_workers("warm_up_sampler")

    async def reset_counters(self) -> None:
        """Forget the rows of the warm-up."""
        await self._ask_workers("sparsity_reset")

    async def snapshots(self) -> list[SparsitySnapshot]:
        """Each replica's sparsity counters; the engine goes on working while a GPU copies them."""
        replicas = await self._ask_workers("sparsity_snapshot_begin")
        while any(None in workers for workers in replicas):
            await asyncio.sleep(_SNAPSHOT_INTERVAL)
            replicas = await self._ask_workers("sparsity_snapshot_poll")
        return [merge(workers) for workers in replicas]

    def kill(self) -> None:
        """End the engine's processes now, also those that are stopped or whose parent is gone; requests get an error."""
        _kill(self._processes)

    async def stop(self) -> None:
        """End the engine's processes and leave nothing of them behind; requests still in it get an error."""
        self._watchdog.stop()
        await asyncio.to_thread(self._llm.shutdown, timeout=_STOP_TIMEOUT)
        self.kill()
        # What ``serve_on`` kept from being looked through is garbage now.
        gc.unfreeze()
        for segment in self._shared_memory:
            segment.unlink(missing_ok=True)

    async def serve_on(self, app: FastAPI) -> None:
        """Attach vLLM's routers, error handlers and state to ``app``, limited to ``API_PATHS``."""
        # vLLM shows the model's path to clients as the model's root; the name says enough.
        arguments = Namespace(**{**vars(self.arguments), "model": self.arguments.served_model_name[0]})
        arguments.enable_offline_docs = True
        tasks: tuple[SupportedTask, ...] = await self._llm.get_supported_tasks()
        await init_app_state(self._llm, app.state, arguments, tasks)
        attach(app)
        # A start-up's worth of long-lived objects need not be looked through at every collection.
        freeze_gc_heap()

    def _step(self) -> None:
        self._watchdog.step()

    def _busy(self) -> bool:
        return self._llm.get_num_unfinished_requests() > 0

    async def _ask(self) -> None:
        # Of EngineCore alone, which reports a worker that died. A worker that is asked waits for the next question at full
        # speed for a second, and vLLM may lose its wake-up, for 5 s each time: enough to be taken for hung on a busy machine.
        await self._llm.engine_core.call_utility_all_async("is_sleeping")

    async def _ask_workers(self, method: str) -> list[list[Any]]:
        """All workers' answers, by replica; vLLM's own ``collective_rpc`` gives those of one replica."""
        client = self._llm.engine_core
        return cast(list[list[Any]], await client.call_utility_all_async("collective_rpc", method, None, (), None))


def _family(processes: Iterable[BaseProcess]) -> list[psutil.Process]:
    """The processes that live and all their descendants, known from here on even where a parent dies."""
    family: list[psutil.Process] = []
    for pid in (process.pid for process in processes if process.pid is not None):
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            family += [*parent.children(recursive=True), parent]
    return family


def _kill(processes: list[psutil.Process]) -> None:
    """End them; one that ends by itself meanwhile is no error."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """The shared memory that the processes have mapped and that only a clean exit would remove."""
    segments = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            segments |= {
                Path(mapping.path) for mapping in process.memory_maps() if mapping.path.startswith(_SHARED_MEMORY)
            }
    return {segment for segment in segments if segment.exists()}


@contextlib.contextmanager
def _children_ignore_interrupt() -> Iterator[None]:
    """Processes started by this thread never see SIGINT.

    Ctrl-C reaches every process of the terminal's foreground group. The engine's have to outlive it, or draining would
    have nothing left to drain; vLLM gives them handlers that end them, but a signal inherited as blocked never arrives.
    """
    # Starting Python's resource tracker unblocks SIGINT in the thread that does it, so it must be there already.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_engines() -> None:
    """End all engine processes now: those of a starting engine ignore anything milder. ``Engine()`` raises then."""
    _kill(_family(multiprocessing.active_children()))


def attach(app: FastAPI) -> None:
    """Add vLLM's routes for ``API_PATHS``, its documentation page and error handlers; needs ``app.state.args``."""
    routers = (chat_completion.router, completion.router, models.router, tokenize.router, basic.router)
    routes = [route for router in routers for route in router.routes if cast(APIRoute, route).path in API_PATHS]
    app.include_router(APIRouter(routes=routes))
    offline_docs.attach_router(app)
    document_served_fields(app)
    init_exception_handler(app)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(EngineDeadError, _on_dead_engine)
    app.add_exception_handler(EngineGenerateError, _on_bug)
    app.add_exception_handler(Exception, _on_bug)


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = cast(HTTPException, error).status_code
    texts = {404: "There is nothing at this path.", 405: "This path does not take that method."}
    headers = cast(HTTPException, error).headers
    return error_response(
        status, texts.get(status, "The request cannot be answered."), dict(headers) if headers else None
    )


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    """Say which field is at fault and why; vLLM's own text repeats what was sent, and the types it was tried as."""
    first = cast(RequestValidationError, error).errors()[0]
    field = clean_loc_for_param(tuple(part for part in first["loc"] if part != "body"))[:_LONGEST_FIELD]
    message = sanitize_message(first["msg"].removeprefix("Value error, "))[:_LONGEST_MESSAGE]
    text = f"{field}: {message}" if field else message
    return JSONResponse(error_body(400, text, field or None), status_code=400)


async def _on_dead_engine(request: Request, error: Exception) -> JSONResponse:
    return error_response(503, INTERNAL_TEXTS[503], headers={"Retry-After": str(RETRY_AFTER)})


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed", exc_info=error)
    return error_response(500, INTERNAL_TEXTS[500])
