"""One run of the server: listen, keep an engine running, serve, drain."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from server.admission import Admission
from server.app import api_app, inner_chain, operations_app, operations_routers, outer_chain
from server.auth import KeyRing
from server.batching import BatchingTelemetry
from server.health import FrontDoor, Health, not_ready
from server.listener import HttpServer, http_server
from server.metrics import ServerMetrics
from server.policy import RequestPolicy
from server.progress import say
from server.rates import KeyRates
from server.settings import Settings
from server.supervisor import EngineFailedError, Supervisor
from server.telemetry import SparsityTelemetry
from sparse_backend.checkpoint import Checkpoint

if TYPE_CHECKING:
    from server.vllm_compat import Engine

# Seconds that uvicorn gets to close connections once their requests are done or cut.
_CLOSE_TIMEOUT = 3

# Seconds between looks at the key file.
_KEY_INTERVAL = 1.0


class Server:
    """One run of the server, from listening to exit."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint, keys: KeyRing, began: float, folder: Path) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._keys = keys
        self._began = began
        self._folder = folder
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._exit_status = 0
        self._kill_engines: Callable[[], None] = lambda: None
        self._telemetry = SparsityTelemetry(checkpoint.layer_densities)
        self._health = Health(settings.stall_timeout)
        self._admission = Admission(settings)
        self._rates = KeyRates(settings)
        self._metrics = ServerMetrics(self._health, self._admission)
        self._metrics.serves(settings.model_name)
        self._batching = BatchingTelemetry(settings.batching)
        self._metrics.registry.register(self._batching)
        self._registries: list[Callable[[], CollectorRegistry]] = [lambda: self._metrics.registry]
        self._operations = operations_routers(self._health, self._telemetry, self._registries)
        self._door = FrontDoor(self._health, operations_app(self._operations))

    async def run(self, listener: socket.socket) -> int:
        """Serve on ``listener``; returns the exit status.

        Raises:
            UserError: vLLM refuses a flag.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        chain = outer_chain(self._door, self._settings, self._keys, self._metrics, self._batching, _write_line)
        http = http_server(chain, self._settings, self._settings.log_level, _CLOSE_TIMEOUT)
        answering = asyncio.create_task(http.serve(sockets=[listener]))
        reloading = asyncio.create_task(self._reload_keys())
        self._batching.listen(self._folder)
        supervisor = Supervisor(
            self._settings, self._health, self._metrics, self._stop, self._start_engine, self._open, self._close
        )
        try:
            engine = await supervisor.run()
            if engine is not None:
                await self._end(engine)
        except EngineFailedError as failure:
            say(f"error: {failure}")
            self._exit_status = 1
        finally:
            reloading.cancel()
            self._batching.close()
            await self._hang_up(http, answering)
        return self._exit_status

    async def _start_engine(self) -> "Engine | None":
        """Start vLLM beside the event loop, so that probes are answered meanwhile; None if a signal came first."""
        starting = asyncio.create_task(asyncio.to_thread(self._load))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():
            stopped.cancel()
            return await starting
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
        if vllm_compat.get_prometheus_registry not in self._registries:
            self._registries.append(vllm_compat.get_prometheus_registry)
        if self._stop.is_set():
            return None
        self._step(f"starting the engine ({'eager' if arguments.enforce_eager else 'compiled'}, {arguments.dtype})")
        return vllm_compat.Engine(arguments)

    async def _open(self, engine: "Engine") -> None:
        """Put the API on a running engine and let requests in."""
        self._step("warming up")
        await engine.warm_up()
        await engine.reset_counters()
        await self._telemetry.start(engine.snapshots)
        app = api_app(self._operations)
        await engine.serve_on(app)
        self._admission.max_running = self._settings.max_running or engine.max_sequences
        policy = RequestPolicy(self._settings, engine.context_length)
        self._door.api = inner_chain(app, self._settings, policy, self._rates, self._admission, self._metrics)
        self._health.ready(engine)
        self._announce(engine.model_name)

    def _close(self) -> None:
        """The engine is gone: nobody need wait for it, and nothing need be asked of it."""
        self._door.api = None
        self._telemetry.stop()
        self._admission.refuse_waiting(not_ready(self._health.refusal() or ""))

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

    async def _end(self, engine: "Engine") -> None:
        await self._drain()
        if self._stop_now.is_set():
            self._kill_engines()
        await engine.stop()

    async def _drain(self) -> None:
        self._health.drain()
        self._admission.refuse_waiting(not_ready(self._health.refusal() or ""))
        if self._health.running:
            say(f"finishing {self._health.running} running requests, for at most {self._settings.drain_timeout:g} s")
        waits = {asyncio.create_task(self._health.idle()), asyncio.create_task(self._stop_now.wait())}
        await asyncio.wait(waits, timeout=self._settings.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._health.running:
            say(f"cutting {self._health.running} running requests")

    async def _hang_up(self, http: HttpServer, answering: "asyncio.Task[None]") -> None:
        http.should_exit = True
        http.force_exit = self._stop_now.is_set()
        await answering

    async def _reload_keys(self) -> None:
        while True:
            await asyncio.sleep(_KEY_INTERVAL)
            self._keys.reload()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._exit_status = 128 + number
            self._stop_now.set()
        self._stop.set()

    def _step(self, text: str) -> None:
        self._health.step = text
        say(text)


def _write_line(line: str) -> None:
    # Whoever read the log may be gone; that is no reason to fail a request.
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)
