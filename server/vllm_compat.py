"""The one module that touches the internals of vLLM's server (0.32.x): flags, engine client, routers, app state.

Importing it imports vLLM, which takes seconds and reads the environment: ``prepare_environment`` goes first.
"""

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import sysconfig
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NoReturn, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs
from vllm.entrypoints.openai.chat_completion import api_router as chat_completion
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.models import api_router as models
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.instrumentator import basic, offline_docs
from vllm.entrypoints.serve.tokenize import api_router as tokenize
from vllm.platforms import current_platform
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as VLLM_VERSION

from server.cli import nearest
from server.errors import error_response
from server.health import RETRY_AFTER
from server.progress import say
from server.settings import Settings
from sparse_backend.checkpoint import MODEL_CLASS, Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.batching import SCHEDULER
from sparse_backend.vllm_plugin.snapshot import SparsitySnapshot

__all__ = ["Engine", "attach", "get_prometheus_registry", "parse_flags"]

# The paths we serve, out of all that vLLM's routers bring.
SERVED_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/version"}
)

# Bytes of key-value cache on a CPU unless the user says otherwise: vLLM's own default is most of the machine's memory.
_CPU_KV_CACHE_BYTES = 1 << 30

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
    if settings.dtype == "float16" and current_platform.is_cpu():
        raise UserError(
            "--dtype float16 needs a GPU: on a CPU we compute in bfloat16 or float32. Give one of these, or leave it out."
        )
    arguments.model = str(checkpoint.folder)
    arguments.served_model_name = [settings.served_model_name or checkpoint.folder.resolve().name]
    arguments.dtype = checkpoint.engine_dtype(settings.dtype, float16=not current_platform.is_cpu())
    arguments.hf_overrides = {"architectures": [MODEL_CLASS]}
    arguments.additional_config = {"prosparse": {"ffn_path": settings.ffn_path, "count_rows": True}}
    arguments.scheduler_cls = SCHEDULER
    arguments.worker_extension_cls = "sparse_backend.vllm_plugin.worker.SparsityWorkerExtension"
    arguments.use_tqdm_on_load = settings.log_level in ("debug", "info")
    if current_platform.is_cpu():
        _set_cpu_defaults(arguments)
    return cast(Namespace, arguments)


def _check_neurons_per_rank(ranks: int, checkpoint: Checkpoint) -> None:
    """The model class refuses this too, but in a process of its own, where the reason would drown."""
    d_ff = checkpoint.config["intermediate_size"]
    if ranks > 1 and d_ff % (8 * ranks):
        raise UserError(
            f"--tensor-parallel-size {ranks} would give each rank {d_ff / ranks:g} of the {d_ff} neurons (intermediate_size) of"
            f" a layer, but the kernels take multiples of 8. Give a number that divides {d_ff // 8}."
        )


def _set_cpu_defaults(arguments: Namespace) -> None:
    if arguments.kv_cache_memory_bytes is None:
        arguments.kv_cache_memory_bytes = _CPU_KV_CACHE_BYTES
    # vLLM 0.32 cannot load the ahead-of-time artifacts that it writes on a CPU: it compiles again, with a warning.
    # Without them, later starts find the inductor's own cache.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if not arguments.enforce_eager and not _can_compile():
        say("no C++ compiler or no Python.h (python3-dev): the model runs uncompiled, which is slower")
        arguments.enforce_eager = True


def _can_compile() -> bool:
    """Is there what torch.compile needs on a CPU? vLLM does not look, and dies in the worker where it is missing."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


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
            self._llm = AsyncLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=arguments.enable_log_requests,
                disable_log_stats=arguments.disable_log_stats,
            )

    @property
    def died(self) -> bool:
        """True once the engine's processes are gone or gave up."""
        return bool(self._llm.errored)

    async def reset_counters(self) -> None:
        """Forget the rows of the warm-up."""
        await self._llm.collective_rpc("sparsity_reset")

    async def snapshots(self) -> list[SparsitySnapshot]:
        """Each worker's sparsity counters; the engine goes on working while a GPU copies them."""
        answers = await self._llm.collective_rpc("sparsity_snapshot_begin")
        while None in answers:
            await asyncio.sleep(_SNAPSHOT_INTERVAL)
            answers = await self._llm.collective_rpc("sparsity_snapshot_poll")
        return cast(list[SparsitySnapshot], answers)

    async def stop(self) -> None:
        """End the engine's processes; requests still in it get an error."""
        await asyncio.to_thread(self._llm.shutdown, timeout=_STOP_TIMEOUT)

    async def serve_on(self, app: FastAPI) -> None:
        """Attach vLLM's routers, error handlers and state to ``app``, limited to ``SERVED_PATHS``."""
        # vLLM shows the model's path to clients as the model's root; the name says enough.
        arguments = Namespace(**{**vars(self.arguments), "model": self.arguments.served_model_name[0]})
        arguments.enable_offline_docs = True
        tasks: tuple[SupportedTask, ...] = await self._llm.get_supported_tasks()
        await init_app_state(self._llm, app.state, arguments, tasks)
        attach(app)
        # A start-up's worth of long-lived objects need not be looked through at every collection.
        freeze_gc_heap()


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
    for process in multiprocessing.active_children():
        if process.pid is not None:
            kill_process_tree(process.pid)


def attach(app: FastAPI) -> None:
    """Add vLLM's routes for ``SERVED_PATHS``, its documentation page and error handlers; needs ``app.state.args``."""
    routers = (chat_completion.router, completion.router, models.router, tokenize.router, basic.router)
    routes = [route for router in routers for route in router.routes if cast(APIRoute, route).path in SERVED_PATHS]
    app.include_router(APIRouter(routes=routes))
    offline_docs.attach_router(app)
    init_exception_handler(app)
    app.add_exception_handler(HTTPException, _on_http_error)
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


async def _on_dead_engine(request: Request, error: Exception) -> JSONResponse:
    return error_response(503, "The engine stopped working.", headers={"Retry-After": str(RETRY_AFTER)})


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    return error_response(500, "The server failed to answer this request.")
