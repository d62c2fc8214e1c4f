"""Families over HTTP, also shared out over processes: replicas (DP) and pipeline stages (PP) on the CPU, one metric stream."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests import families
from tests.e2e import greedy
from tests.e2e.servers import Server

pytestmark = pytest.mark.engine

PROMPTS = [
    [5, 6, 7, 8],
    [40, 41, 42],
    [200, 12, 13, 14, 15],
    [9, 8, 7],
    [100, 101],
    [60, 70, 80, 90],
    [33, 34],
    [250, 3, 4],
]


class Case(NamedTuple):
    family: str
    flags: tuple[str, ...]
    replicas: int


CASES = {
    "one process": Case("minicpm-s", ("--enforce-eager",), 1),
    "two replicas": Case("turbosparse-mistral", ("--enforce-eager", "--data-parallel-size", "2"), 2),
    # Uncompiled, vLLM's own pipeline dies on a CPU.
    "two stages": Case("sparseqwen2", ("--pipeline-parallel-size", "2"), 1),
}


class Running(NamedTuple):
    case: Case
    server: Server
    expected: list[list[int]]


@pytest.fixture(scope="module", params=CASES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp("served")
    model = families.write(root / "model", case.family)
    server = Server(
        root / "model",
        root / "log",
        *("--dtype", "float32", "--ffn-path", "sparse"),
        # Two workers on a busy machine with two cores: no step's length says anything of their health.
        *("--stall-timeout", "120", "--restart-timeout", "240"),
        *("--", "--max-num-seqs", "8", *case.flags),
    )
    try:
        server.wait_ready()
        yield Running(case, server, [greedy.from_model(model, prompt) for prompt in PROMPTS])
    finally:
        server.close()


def test_tokens_are_hugging_faces_and_every_row_is_counted_once(running: Running) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        tokens = list(pool.map(lambda prompt: greedy.from_server(running.server, prompt), PROMPTS))
    assert tokens == running.expected
    metrics = running.server.metrics_of_now()
    rows = sum(map(len, PROMPTS)) + len(PROMPTS) * (greedy.TOKENS - 1)
    for layer in ("0", "1"):
        labels = frozenset({"layer": layer, "path": "sparse"}.items())
        assert metrics["sparse_ffn_rows_total", labels] == rows
        assert metrics["sparse_ffn_neurons", frozenset({"layer": layer}.items())] == 256
        assert 0 < metrics["sparse_ffn_active_neurons_total", labels] < rows * 256
    served = [value for (name, _), value in metrics.items() if name == "vllm:request_success_total" and value]
    assert sum(served) == len(PROMPTS)
    assert len(served) == running.case.replicas
