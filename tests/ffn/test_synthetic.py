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


def test_frequencies_are_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = synthetic.Layer.random(torch.float32, 256, 1024, generator)
    wanted = torch.linspace(0, 1, 1024)
    layer.set_frequencies(wanted)
    x = synthetic.inputs(2000, torch.float32, 256, generator)
    measured = (x @ layer.gate_up[:1024].t() > synthetic.THRESHOLD).float().mean(dim=0)
    assert measured[0] == 0
    assert measured[-1] == 1
    # Neurons share random rows on a CPU, so that a neuron's own error is larger than chance alone gives.
    assert (measured - wanted).abs().max() < 0.15
    assert (measured - wanted).abs().mean() < 0.03


def test_a_shift_acts_on_the_rows_of_its_selector() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = synthetic.Layer.random(torch.bfloat16, 256, 64, generator)
    masks = torch.rand(3, 64, generator=generator) < 0.5
    layer.set_shift(torch.where(masks.t(), synthetic.ALWAYS, -synthetic.ALWAYS))
    x = synthetic.inputs(3, torch.bfloat16, 256, generator, torch.eye(3))
    assert torch.equal((x.float() @ layer.gate_up[:64].float().t()) > 0, masks)


def test_the_dtype_and_device_of_a_model_being_built_do_not_matter() -> None:
    def build() -> synthetic.Layer:
        layer = synthetic.Layer.random(torch.float32, 16, 32, torch.Generator().manual_seed(0))
        layer.set_density(0.3)
        return layer

    plain = build()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            built = build()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain.gate_up, built.gate_up)


def test_cache_is_at_least_a_plausible_size() -> None:
    assert synthetic.cache_bytes(torch.device("cpu")) >= 32 * 2**20
