import pytest

from sparse_backend.vllm_plugin.snapshot import LayerSnapshot, SparsitySnapshot, add_up, merge


def layer(index: int, active: int, union: int, rows: int = 10, steps: int = 2) -> LayerSnapshot:
    return {
        "layer": str(index),
        "d_ff": 64,
        "neuron_bytes": 32,
        "max_sparse_rows": 4,
        "dense_reason": "",
        "paths": {
            "sparse": {"rows": rows, "active": active, "union": union, "steps": steps},
            "dense": {"rows": 0, "active": 0, "union": 0, "steps": 0},
        },
    }


def snapshot(*layers: LayerSnapshot) -> SparsitySnapshot:
    return {"kernel": {"name": "cpu", "isa": "avx2", "reason": ""}, "layers": list(layers)}


def test_tensor_parallel_ranks_add_up_neurons_but_not_rows() -> None:
    ranks = [snapshot(layer(0, active=30, union=12)), snapshot(layer(0, active=50, union=20))]
    (whole,) = merge(ranks)["layers"]
    assert whole["d_ff"] == 128
    assert whole["neuron_bytes"] == 32, "a rank has fewer neurons, not narrower ones"
    assert whole["paths"]["sparse"] == {"rows": 10, "active": 80, "union": 32, "steps": 2}


def test_pipeline_ranks_are_put_side_by_side_in_model_order() -> None:
    merged = merge([snapshot(layer(10, 1, 1), layer(11, 1, 1)), snapshot(layer(2, 1, 1), layer(9, 1, 1))])
    assert [part["layer"] for part in merged["layers"]] == ["2", "9", "10", "11"]


def test_merging_leaves_the_parts_as_they_were() -> None:
    first, second = snapshot(layer(0, 30, 12)), snapshot(layer(0, 50, 20))
    merge([first, second])
    assert first == snapshot(layer(0, 30, 12))


def test_no_worker_is_an_error() -> None:
    with pytest.raises(ValueError, match="no worker"):
        merge([])


def test_replicas_add_up_everything_but_their_neurons() -> None:
    replicas = [snapshot(layer(0, 70, 40), layer(1, 5, 4)), snapshot(layer(0, 30, 20, rows=7, steps=3), layer(1, 1, 1))]
    whole, second = add_up(replicas)["layers"]
    assert whole["d_ff"] == 64
    assert whole["paths"]["sparse"] == {"rows": 17, "active": 100, "union": 60, "steps": 5}
    assert second["paths"]["sparse"]["rows"] == 20
    # What they were made of is as it was.
    assert replicas[0]["layers"][0]["paths"]["sparse"]["rows"] == 10


def test_replicas_of_tensor_parallel_ranks() -> None:
    one = merge([snapshot(layer(0, 70, 40)), snapshot(layer(0, 30, 20))])
    other = merge([snapshot(layer(0, 7, 4, rows=1, steps=1)), snapshot(layer(0, 3, 2, rows=1, steps=1))])
    (whole,) = add_up([one, other])["layers"]
    assert whole["d_ff"] == 128
    assert whole["paths"]["sparse"] == {"rows": 11, "active": 110, "union": 66, "steps": 3}


def test_no_replica_is_an_error() -> None:
    with pytest.raises(ValueError, match="no worker"):
        add_up([])
