import torch

from sparse_backend.ffn import counters
from sparse_backend.ffn.counters import ACTIVE, DENSE, ROWS, SPARSE, STEPS, UNION


def test_new_counters_are_zero_int64() -> None:
    assert torch.equal(counters.new_counters(), torch.zeros(2, 4, dtype=torch.int64))


def test_densities_join_both_paths() -> None:
    counts = counters.new_counters()
    counts[SPARSE, [ROWS, ACTIVE, UNION, STEPS]] = torch.tensor([4, 20, 15, 2])
    counts[DENSE, [ROWS, ACTIVE, UNION, STEPS]] = torch.tensor([6, 60, 85, 2])
    assert counters.density(counts, d_ff=100) == 80 / 1000
    assert counters.union_density(counts, d_ff=100) == 100 / 400


def test_densities_before_the_first_step() -> None:
    assert counters.density(counters.new_counters(), 8) is None
    assert counters.union_density(counters.new_counters(), 8) is None
