from sparse_backend.bench.engine import Generation
from sparse_backend.bench.parity import find_partings


def generation(*tokens: int, gap: float = 1.0) -> Generation:
    return Generation(list(tokens), [[-0.5, -0.5 - gap]] * len(tokens))


def test_equal_continuations_do_not_part() -> None:
    assert find_partings([generation(1, 2, 3)], [generation(1, 2, 3)]) == []


def test_only_the_first_difference_of_a_sequence_counts() -> None:
    dense = [generation(1, 2, 3, 4, gap=0.25), generation(7, 8, 9, 9)]
    sparse = [generation(1, 5, 3, 6), generation(7, 8, 9, 9)]
    assert find_partings(dense, sparse) == [{"prompt": 0, "position": 1, "gap": 0.25}]
