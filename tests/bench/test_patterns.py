import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_backend.bench.patterns import Frequencies, Recorded, read_frequencies, read_recording
from sparse_backend.errors import UserError
from sparse_backend.ffn import synthetic

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def gates(layer: synthetic.Layer, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.gate_up[: layer.d_ff].t()


def test_reads_a_manifest() -> None:
    table = read_frequencies(DEMO / "prosparse.json")
    layers = json.loads((DEMO / "prosparse.json").read_text())["layers"]
    assert table.shape == (len(layers), len(layers[0]["neuron_frequency"]))
    assert table[1].mean().item() == pytest.approx(1 - layers[1]["sparsity"], abs=0.01)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npz", {"freq": np.ones((2, 3))}, "freq_all"),
        ("a.npz", {"freq_all": np.ones(3)}, "table of layers x neurons"),
        ("a.npz", {"freq_all": np.full((2, 3), 1.5)}, "shares from 0 to 1"),
        ("a.npz", {"freq_all": np.full((2, 3), np.nan)}, "shares from 0 to 1"),
        ("prosparse.json", b"{}", "cannot be read as frequencies"),
        ("a.npz", b"PK", "cannot be read as frequencies"),
        ("a.npz", b"text", "cannot be read as frequencies"),
    ],
)
def test_refuses_what_is_no_table_of_frequencies(tmp_path: Path, name: str, content: object, words: str) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **content)
    with pytest.raises(UserError, match=words):
        read_frequencies(file)


def test_refuses_what_is_no_recording(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(UserError, match="matrix of rows x neurons"):
        read_recording(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_text("text")
    with pytest.raises(UserError, match="cannot be read as a recording"):
        read_recording(tmp_path / "b.npy")


def test_layers_take_the_models_layers_in_turn() -> None:
    pattern = Frequencies(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    assert [pattern.density(index) for index in range(5)] == [0, 1, 0.5, 0, 1]
    generator = torch.Generator().manual_seed(0)
    layer = synthetic.Layer.random(torch.float32, 64, 128, generator)
    x = pattern.inputs(3, torch.float32, 64, generator)
    for index, active in ((0, 0.0), (4, 1.0), (2, 0.5)):
        pattern.apply(layer, index, 3, generator)
        assert (gates(layer, x) > 0).float().mean().item() == pytest.approx(
            active, abs=0.0 if active in (0, 1) else 0.15
        )


def test_rows_of_another_width_keep_what_they_share() -> None:
    masks = torch.rand(10, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    pattern = Recorded(torch.cat([masks, masks]), most_rows=20)
    generator = torch.Generator().manual_seed(0)
    layer = synthetic.Layer.random(torch.float32, 64, 128, generator)
    pattern.apply(layer, 0, 20, generator)
    active = gates(layer, pattern.inputs(20, torch.float32, 64, generator)) > 0
    # Every row was drawn once, so that each has its double among them.
    assert len({tuple(row) for row in active.tolist()}) == 10
    assert active.float().mean().item() == pytest.approx(masks.float().mean().item(), abs=0.1)


def test_fewer_rows_after_more() -> None:
    masks = torch.eye(4, 32, dtype=torch.bool)
    pattern = Recorded(masks, most_rows=4)
    generator = torch.Generator().manual_seed(0)
    layer = synthetic.Layer.random(torch.float32, 64, 32, generator)
    for rows in (4, 1, 2):
        pattern.apply(layer, 0, rows, generator)
        active = gates(layer, pattern.inputs(rows, torch.float32, 64, generator)) > 0
        assert active.sum(dim=1).tolist() == [1] * rows
        assert active.any(dim=0).sum() == rows
