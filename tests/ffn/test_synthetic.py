import pytest
import torch

from sparse_backend.ffn import counters, sparse_gated_ffn, synthetic


@pytest.mark.parametrize("density", [0.0, 0.107, 0.5, 1.0])
def test_density_is_as_asked(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = synthetic.Layer.random(torch.bfloat16, 256, 1024, generator)
    layer.set_density(0.3)
    layer.set_density(density)
    counted = counters.new_counters()
    x = synthetic.inputs(64, torch.bfloat16, 256, generator)
    sparse_gated_ffn(x, layer.gate_up, layer.down_t, synthetic.THRESHOLD, counted, 0)
    measured = counters.density(counted, 1024)
    assert measured == pytest.approx(density, abs=0.0 if density in (0, 1) else 0.02)


def test_cache_is_at_least_a_plausible_size() -> None:
    assert synthetic.cache_bytes() >= 32 * 2**20
