from sparse_backend.bench.routing import place
from sparse_backend.vllm_plugin.cost import LayerTable, StepCost

# Like a 7B layer's: a step grows with its union, and hardly with its rows.
TABLE = LayerTable(
    [
        (rows, 1 - (1 - density) ** rows, 20 + 40 * (1 - (1 - density) ** rows))
        for rows in (1, 4, 16)
        for density in (0.05, 0.2)
    ],
    [(rows, 75 + 0.1 * rows) for rows in (1, 16, 64, 256)],
)
COST = StepCost(TABLE, scale=40, max_sparse_rows=16)


def test_sparse_and_dense_traffic_part() -> None:
    replicas: list[list[float]] = [[], []]
    for density in [0.02, 0.2] * 6:
        replicas[place(COST, replicas, density)].append(density)
    assert sorted(map(set, replicas), key=min) == [{0.02}, {0.2}]


def test_equal_traffic_is_shared_evenly() -> None:
    for density in (0.02, 0.2):
        replicas: list[list[float]] = [[], [], []]
        for _ in range(12):
            replicas[place(COST, replicas, density)].append(density)
        assert [len(rows) for rows in replicas] == [4, 4, 4]


def test_a_replica_beyond_the_sparse_path_takes_what_costs_it_nothing_more() -> None:
    crowd = [0.2] * 20
    assert place(COST, [crowd, [0.02] * 10], 0.2) == 0
    assert place(COST, [crowd, [0.02] * 10], 0.02) == 1
