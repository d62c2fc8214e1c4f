from pathlib import Path

import pytest

from server.cli import main
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
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "batching", "--model", str(DEMO), *arguments]) == 2
    assert message in capsys.readouterr().err


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
