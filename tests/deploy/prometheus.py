"""A real Prometheus with the shipped configuration."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.servers import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus"

MISSING = "needs {}, which Debian's package prometheus has (apt-get install prometheus)"


def program(name: str) -> str | None:
    """Where ``prometheus`` or ``promtool`` is."""
    return shutil.which(name)


class Prometheus:
    """Scrapes one server; what it is told is what is shipped, but for the address and, not to wait for it, the intervals."""

    def __init__(self, folder: Path, target: str, interval: str = "1s") -> None:
        shutil.copytree(CONFIGURATION, folder / "etc")
        shipped = (folder / "etc" / "prometheus.yml").read_text()
        changed = shipped.replace('"server:8000"', f'"{target}"').replace("_interval: 15s", f"_interval: {interval}")
        assert changed.count(target) == 1
        assert changed.count(f"_interval: {interval}") == 2
        (folder / "etc" / "prometheus.yml").write_text(changed)
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self._client = httpx.Client(base_url=f"{self.url}/api/v1", timeout=30)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(program("prometheus")),
                    f"--config.file={folder / 'etc' / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_scraped(self, limit: float = 30) -> None:
        """Until its target has answered."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if any(series["value"][1] == "1" for series in self.query("up")):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"Prometheus did not scrape its target in {limit} s:\n{self._log.read_text()}")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query, with their newest ``value``."""
        return self._result("query", query=expression)

    def query_range(self, expression: str, seconds: float, step: float) -> list[dict[str, Any]]:
        """The series of the last ``seconds``, with their ``values`` every ``step`` seconds."""
        now = time.time()
        return self._result("query_range", query=expression, start=now - seconds, end=now, step=step)

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health."""
        answer = self._client.get("rules").json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    def _result(self, path: str, **parameters: str | float) -> list[dict[str, Any]]:
        answer = self._client.post(path, data=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        series = answer["data"]["result"]
        # A bare number comes as [time, value].
        return [{"metric": {}, "value": series}] if answer["data"]["resultType"] == "scalar" else series

    def close(self) -> None:
        """End it."""
        self._client.close()
        self._process.terminate()
        self._process.wait(30)
