"""``prosparse serve``: check everything that can be checked, listen, start the engine, serve, drain."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry

from server.app import api_app, operations_app, operations_routers, with_keys
from server.batching import BatchingTelemetry, batching_settings
from server.health import FrontDoor, Health
from server.progress import say, write_logging_config
from server.settings import Settings, add_flags
from server.telemetry import SparsityTelemetry
from sparse_backend.checkpoint import Checkpoint
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.batching import SETTINGS_VARIABLE

if TYPE_CHECKING:
    from server.vllm_compat import Engine

# Seconds that uvicorn gets to close connections once their requests are done or cut.
_CLOSE_TIMEOUT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags: one for each setting."""
    add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal says to stop; returns the exit status."""
    flags = vars(arguments)
    if not flags["vllm_flags"]:
        del flags["vllm_flags"]
    settings = Settings.load(flags)
    keys = settings.api_keys()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prosparse-", ignore_cleanup_errors=True) as folder:
        prepare_environment(settings, Path(folder))
        # Hashing a large checkpoint takes minutes.
        say(f"checking {settings.model}")
        checkpoint = Checkpoint.open(settings.model)
        verified = "every file matches its manifest" if checkpoint.manifest else "no manifest"
        say(f"checkpoint {settings.model}: {checkpoint.activation}, {checkpoint.n_layers} layers, {verified}")
        with _listen(settings.host, settings.port) as listener:
            return uvloop.run(Server(settings, checkpoint, keys, began, Path(folder)).run(listener))


def prepare_environment(settings: Settings, folder: Path) -> None:
    """Set what vLLM and its processes read from the environment, where the user has not; before torch is imported."""
    defaults = {
        # Models come from folders, and a private server reports to nobody.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": settings.log_level.upper(),
        # Sockets between vLLM's processes, in a folder that only this user can enter and that goes with the server.
        "VLLM_RPC_BASE_PATH": str(folder),
        SETTINGS_VARIABLE: batching_settings(settings, folder).model_dump_json(),
    }
    if settings.log_level == "warning" and not {"VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL"} & os.environ.keys():
        defaults["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
        # Warnings of torch and Python for the developers of vLLM.
        defaults["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        defaults["TORCH_LOGS"] = "-torch._library.triton"
        defaults["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker"
        write_logging_config(folder / "logging.json")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host}: no address to listen on ({error.strerror}). Give an address of this machine."
        ) from None
    with listener:
        # A port whose last connections are still winding down is free; one that somebody listens on is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot listen on {host}:{port} ({error.strerror}). Stop the program that has the port"
                f" (`ss -ltnp 'sport = :{port}'` names it) or give another --port."
            ) from None
        yield listener


class _HttpServer(uvicorn.Server):
    """uvicorn, with signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handler: a signal means drain, which uvicorn's own know nothing of."""
        yield


class Server:
    """One run of the server, from listening to exit."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, keys: list[str], began: float, folder: Path) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._keys = keys
        self._began = began
        self._folder = folder
        self._telemetry = SparsityTelemetry(checkpoint.layer_densities)
        self._health = Health(self._telemetry.unanswered)
        self._registries: list[Callable[[], CollectorRegistry]] = []
        self._batching = BatchingTelemetry(settings.batching)
        self._operations = operations_routers(self._health, self._telemetry, self._registries, [self._batching])
        self._door = FrontDoor(self._health, operations_app(self._operations))
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._exit_status = 0
        self._kill_engines: Callable[[], None] = lambda: None

    async def run(self, listener: socket.socket) -> int:
        """Serve on ``listener``; returns the exit status.

        Raises:
            UserError: vLLM refuses a flag.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        http = _HttpServer(
            uvicorn.Config(
                with_keys(self._door, self._keys),
                lifespan="off",
                ws="none",
                log_level=self._settings.log_level,
                access_log=self._settings.log_level in ("debug", "info"),
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT,
            )
        )
        answering = asyncio.create_task(http.serve(sockets=[listener]))
        self._batching.listen(self._folder)
        try:
            engine = await self._start_engine()
            if engine is not None:
                await self._serve(engine)
        finally:
            http.should_exit = True
            http.force_exit = self._stop_now.is_set()
            self._batching.close()
            await answering
        return self._exit_status

    async def _start_engine(self) -> "Engine | None":
        """Start vLLM beside the event loop, so that probes are answered meanwhile; None if a signal came first."""
        starting = asyncio.create_task(asyncio.to_thread(self._load))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():
            stopped.cancel()
            try:
                return await starting
            except UserError:
                raise
            except Exception as error:
                # vLLM reports the cause where it happens, in a process of its own, and raises something general here.
                say(f"error: the engine did not start: {' '.join(str(error).split())} Its own messages are above.")
                self._exit_status = 1
                return None
        say("stopping before the engine is up")
        while not starting.done():
            self._kill_engines()
            await asyncio.wait({starting}, timeout=0.2)
        if starting.exception() is None and (engine := starting.result()) is not None:
            await engine.stop()
        return None

    def _load(self) -> "Engine | None":
        self._step("importing vLLM")
        from server import vllm_compat

        self._kill_engines = vllm_compat.kill_engines
        arguments = vllm_compat.parse_flags(self._settings, self._checkpoint)
        self._registries.append(vllm_compat.get_prometheus_registry)
        if self._stop.is_set():
            return None
        self._step(f"starting the engine ({'eager' if arguments.enforce_eager else 'compiled'}, {arguments.dtype})")
        return vllm_compat.Engine(arguments)

    async def _serve(self, engine: "Engine") -> None:
        try:
            await engine.reset_counters()
            await self._telemetry.start(engine.snapshots)
            app = api_app(self._operations)
            await engine.serve_on(app)
            self._door.api = app
            self._health.ready(engine)
            self._announce(engine.arguments.served_model_name[0])
            await self._until_stopped(engine)
            await self._drain()
        finally:
            if self._stop_now.is_set():
                self._kill_engines()
            await engine.stop()

    def _announce(self, name: str) -> None:
        kernel = self._telemetry.kernel
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"http://{host}:{self._settings.port}"
        key = " -H 'Authorization: Bearer YOUR-KEY'" if self._keys else ""
        body = f'{{"model": "{name}", "prompt": "def ", "max_tokens": 64}}'
        seconds = time.monotonic() - self._began
        detail = "; ".join(part for part in (kernel["isa"], kernel["reason"]) if part)
        say(f"ready at {address} after {seconds:.0f} s, model {name}, kernel {kernel['name']} ({detail})")
        say(f"try: curl {address}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'")

    async def _until_stopped(self, engine: "Engine") -> None:
        died = False
        while not self._stop.is_set():
            if engine.died and not died:
                died = True
                self._exit_status = 1
                say("the engine stopped working; requests are refused until the server is started anew")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), timeout=1)

    async def _drain(self) -> None:
        self._health.drain()
        if self._health.running:
            say(f"finishing {self._health.running} running requests, for at most {self._settings.drain_timeout:g} s")
        waits = {asyncio.create_task(self._health.idle()), asyncio.create_task(self._stop_now.wait())}
        await asyncio.wait(waits, timeout=self._settings.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._health.running:
            say(f"cutting {self._health.running} running requests")

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._exit_status = 128 + number
            self._stop_now.set()
        self._stop.set()

    def _step(self, text: str) -> None:
        self._health.step = text
        say(text)
