"""`prosparse serve` in a process of its own, for benchmarks that speak HTTP to it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from sparse_backend.errors import UserError

_START_LIMIT_S = 600.0


class ServerProcess:
    """One server on a free port of this machine; a context manager that ends it."""

    def __init__(
        self, model: Path, flags: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it.

        Args:
            model: checkpoint folder, whose name it is served under.
            flags: settings of ours, and after ``--`` vLLM's.
            log: file for its output.
            environment: set for it beside ours.
        """
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.model = model.resolve().name
        self._log = log
        command = [sys.executable, "-m", "server.cli", "serve", str(model), "--port", str(port), *flags]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )

    def wait_ready(self) -> None:
        """Return once it serves.

        Raises:
            UserError: it ended before, or was not ready in time; the text has the end of its output.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        raise UserError(f"The server did not start; its output is in {self._log} and ends with:\n{tail}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Twice: the second signal cuts requests that still run.
        for _ in range(2):
            if self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(15)
                except subprocess.TimeoutExpired:
                    continue
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
