"""`prosparse serve` as a process of its own, as a user runs it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

# The command is found beside Python, or where the environment says: a client may live in another environment than the server.
PROSPARSE = Path(os.environ.get("PROSPARSE", Path(sys.executable).with_name("prosparse")))

# Seconds a first start may take on a busy two-core machine: it builds the kernels and compiles the model.
START_LIMIT = 240


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """One running server; its messages go to ``log``, its lines on requests to ``requests_log`` beside it."""

    def __init__(self, model: Path, log: Path, *flags: str, key: str | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.requests_log = log.with_name("requests.jsonl")
        # One client for all: making one takes longer than most requests.
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=self.url, timeout=30, headers=self.headers)
        command = [str(PROSPARSE), "serve", str(model), "--port", str(self.port), *flags]
        with log.open("wb") as messages, self.requests_log.open("wb") as requests:
            # A group of its own, so that a test can signal it as a terminal does. Not a session: of sessions that share cores
            # Linux 6.18 has been seen to let one, the client's, wait for a second.
            self.process = subprocess.Popen(command, stdout=requests, stderr=messages, process_group=0)

    def get(self, path: str) -> httpx.Response:
        """GET one path."""
        return self._client.get(path)

    def post(self, path: str, body: object) -> httpx.Response:
        """POST JSON to one path."""
        return self._client.post(path, json=body)

    def post_raw(self, path: str, body: bytes, content_type: str) -> httpx.Response:
        """POST any bytes to one path."""
        return self._client.post(path, content=body, headers={"Content-Type": content_type})

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """{(name, labels): value} of one scrape."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def metrics_of_now(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The same, of everything that was computed until now: the engine's counters in a scrape may be a second old."""
        # server.telemetry.MIN_INTERVAL: clients run in an environment without the server.
        time.sleep(1)
        return self.metrics()

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels among theirs; 0 if there are none."""
        return sum(
            value
            for (found, pairs), value in self.metrics().items()
            if found == name and labels.items() <= dict(pairs).items()
        )

    def wait_until(self, condition: Callable[[], bool], limit: float, what: str) -> float:
        """Seconds until the condition holds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > limit:
                raise AssertionError(f"not {what} within {limit} s:\n{self.log.read_text()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def shared_memory(self) -> set[Path]:
        """What there is under /dev/shm that one of the server's processes has mapped."""
        return {path for pid in self.processes() for path in _mapped(pid) if path.exists()}

    def memory(self) -> dict[str, int]:
        """Resident bytes of each process, by its name."""
        page = os.sysconf("SC_PAGE_SIZE")
        return {_name(pid): int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in self.processes()}

    def engine_process(self, role: str) -> int:
        """The process of the engine that calls itself ``role``: EngineCore or Worker."""
        (pid,) = (pid for pid in self.processes() if f"VLLM::{role}".startswith(_name(pid)) and "::" in _name(pid))
        return pid

    def wait_listening(self) -> None:
        """Until the server answers at all."""
        self._wait_for("/livez", 60)

    def wait_ready(self) -> None:
        """Until it serves requests."""
        self._wait_for("/readyz", START_LIMIT)

    def _wait_for(self, path: str, limit: float) -> None:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.get(path).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"the server did not answer {path} with 200 in {limit} s:\n{self.log.read_text()}")

    def close(self) -> None:
        """End the server if it still runs, the hard way if it must be."""
        self._client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(60)

    def processes(self) -> list[int]:
        """Processes of the server's group that are still there, zombies aside."""
        alive = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                state, group = fields[0], int(fields[2])
                if group == self.process.pid and state != "Z":
                    alive.append(int(entry.name))
        return alive


def _name(pid: int) -> str:
    """A process's name, of which the kernel keeps 15 bytes."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except FileNotFoundError:
        return ""


def _mapped(pid: int) -> set[Path]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6 and "/dev/shm/" in line}
