import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.cli import main
from sparse_backend.bench import batching_replays
from sparse_backend.bench.routing import ByDensity, Even
from sparse_backend.bench.synthetic_checkpoint import write_checkpoint
from sparse_backend.bench.synthetic_model import SHAPES, SyntheticModel
from sparse_backend.errors import UserError
from sparse_backend.vllm_plugin.cost import LayerTable, StepCost

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "fcfs,fair"], "--policy 'fair' is no policy. Known are fcfs, "),
        (["--trace", "rush"], "'rush' is no trace. Known are chat, "),
        (["--placement", "luck"], "--placement 'luck' is none. Known are even, density"),
        (["--load", "half"], "--load 'half' is not a comma-separated list of numbers"),
        (["--folder", "x"], "--folder is for --synthetic"),
        (["--clients", "2", "--rate", "3"], "--rate is for --load, and with --clients there is none"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "batching", "--model", str(DEMO), *arguments]) == 2
    assert message in capsys.readouterr().err


class _Answers(BaseHTTPRequestHandler):
    """Twenty tokens in a tenth of a second for any prompt, and a metric."""

    def do_GET(self) -> None:
        self._begin()
        self.wfile.write(b'# TYPE sparse_cost_error_ratio gauge\nsparse_cost_error_ratio{path="sparse"} 0.25\n')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._begin()
        with contextlib.suppress(ConnectionError):  # the client leaves at its time
            for _ in range(20):
                self.wfile.write(b"data: {}\n\n")
                time.sleep(0.005)
            self.wfile.write(b'data: {"usage": {"completion_tokens": 20}}\n\n')

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@dataclass
class _FakeServer:
    url: str
    model: str = "demo"


@pytest.fixture
def fake_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def servers(
        _checkpoint: object, _plan: object, _logs: object, policies: Sequence[str]
    ) -> Iterator[list[_FakeServer]]:
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _Answers)) for _ in policies]
            for server in running:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                stack.callback(server.shutdown)
            yield [_FakeServer(f"http://127.0.0.1:{server.server_port}") for server in running]

    monkeypatch.setattr(batching_replays, "_servers", servers)
    # In this process: tests/e2e/test_batching.py has the processes, which take seconds to start.
    monkeypatch.setattr(batching_replays, "_pool", ThreadPoolExecutor)


@pytest.mark.parametrize(
    ("arguments", "replays"),
    [
        (["--load", "0.5"], [("fcfs", 0.5, None), ("sparse", 0.5, None)]),
        (["--policy", "fcfs", "--clients", "1,3"], [("fcfs", None, 1), ("fcfs", None, 3)]),
        (["--placement", "even,density", "--clients", "4"], [("fcfs, even", None, 4), ("fcfs, density", None, 4)]),
    ],
)
def test_traffic_is_replayed_and_told_of(
    arguments: list[str],
    replays: list[tuple[str, float | None, int | None]],
    fake_servers: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "report.json"
    flags = ["--trace", "qa", "--seconds", "2", "--saturate", "2", "--at-once", "4", "--json", str(out)]
    assert main(["bench", "batching", "--model", str(DEMO), *flags, *arguments]) == 0
    report = json.loads(out.read_text())
    assert [(one["policy"], one["load"], one["clients"]) for one in report["replays"]] == replays
    for one in report["replays"]:
        assert one["cost_error"] == {"sparse": 0.25}
        assert one["summary"]["failed"] == 0
        assert one["summary"]["all"]["itl_p50_ms"] == pytest.approx(5, abs=4)
        if one["clients"]:
            # Each has one request at a time, which takes a tenth of a second; those cut off are left out.
            assert one["clients"] <= one["summary"]["all"]["requests"] <= one["clients"] * 20
    told = capsys.readouterr().out
    assert all(f"{one['clients']} clients" in told for one in report["replays"] if one["clients"])
    assert "tokens/s | merged" in " ".join(told.split()).replace("┃", "|")


def test_clients_without_an_answer_are_said(
    fake_servers: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Answers, "do_POST", lambda _: time.sleep(3))
    arguments = ["--trace", "qa", "--policy", "fcfs", "--clients", "1", "--seconds", "1"]
    assert main(["bench", "batching", "--model", str(DEMO), *arguments]) == 2
    assert "No client had an answer within 1 s. Give a longer --seconds, or fewer --clients." in capsys.readouterr().err


def test_a_synthetic_checkpoint_is_written_once_and_only_into_a_folder_of_its_own(tmp_path: Path) -> None:
    model = SyntheticModel(SHAPES["tiny"], 0.0, classes=(0.02, 0.3))
    checkpoint = write_checkpoint(tmp_path / "tiny", model)
    assert len(checkpoint.shards) == 1
    written = checkpoint.shards[0].stat().st_mtime_ns
    assert write_checkpoint(tmp_path / "tiny", model).shards[0].stat().st_mtime_ns == written
    other = SyntheticModel(SHAPES["tiny"], 0.0, classes=(0.02, 0.2))
    with pytest.raises(UserError, match="holds something else than this model"):
        write_checkpoint(tmp_path / "tiny", other)


def test_even_goes_to_the_fewest_requests_in_turn() -> None:
    router = Even(3)
    assert [router.begin("a") for _ in range(4)] == [0, 1, 2, 0]
    router.end(1, "a")
    assert router.begin("a") == 1


def test_by_density_parts_the_classes_and_forgets_what_has_left() -> None:
    table = LayerTable(
        [(rows, union, 20 + 60 * union) for rows in (1, 8, 16) for union in (0.05, 0.5, 0.9)], [(1, 80), (64, 82)]
    )
    router = ByDensity(2, StepCost(table, scale=40, max_sparse_rows=16), {"qa": 0.02, "long": 0.2})
    places = [(name, router.begin(name)) for name in ["qa", "long"] * 3]
    assert len(set(places)) == len({index for _, index in places}) == 2
    for name, index in places:
        router.end(index, name)
    assert router.begin("long") == 0
