"""Random layers whose neurons are active as often as wanted: what timing runs on."""

from dataclasses import dataclass
from pathlib import Path

import torch

THRESHOLD = 0.0
"""The activation threshold these layers are made for: ReLU."""

ALWAYS = 8.0
"""A shift of a gate value, in standard deviations, that no normal variable gets over."""

_CPU_BLOCKS = 16  # there random rows are drawn once and repeated so often: drawing all takes longer than timing them


@dataclass(frozen=True)
class Layer:
    """Weights as the op takes them: gate_up [2 * d_ff, d_model], down_t [d_ff, d_model]."""

    gate_up: torch.Tensor
    down_t: torch.Tensor

    @classmethod
    def random(cls, dtype: torch.dtype, d_model: int, d_ff: int, generator: torch.Generator) -> "Layer":
        """Normal weights on the generator's device, scaled so that gate and up values have unit variance for ``inputs``."""
        gate_up = _random_rows(2 * d_ff, d_model, d_model**-0.5, dtype, generator)
        return cls(gate_up, _random_rows(d_ff, d_model, d_ff**-0.5, dtype, generator))

    @property
    def d_ff(self) -> int:
        """Neurons of the layer."""
        return self.down_t.shape[0]

    def set_density(self, density: float) -> None:
        """Make every neuron active with this probability for each row from ``inputs``, independently of all others."""
        self.set_frequencies(torch.full((self.d_ff,), density, dtype=torch.float32, device=self.gate_up.device))

    def set_frequencies(self, frequencies: torch.Tensor) -> None:
        """Make neuron n active with probability ``frequencies[n]``, [d_ff], independently of neurons and rows."""
        self.set_shift(shift_of(frequencies).unsqueeze(1))

    def set_shift(self, shift: torch.Tensor) -> None:
        """Add ``shift[n, k]``, [d_ff, selectors], to the gate values of neuron n for rows whose selector k is 1."""
        self.gate_up[: self.d_ff, : shift.shape[1]] = shift.to(self.gate_up)


def shift_of(frequencies: torch.Tensor) -> torch.Tensor:
    """What must be added to a standard normal variable for it to be above ``THRESHOLD`` with these probabilities."""
    return torch.special.ndtri(frequencies.float()).clamp(-ALWAYS, ALWAYS)


def inputs(
    rows: int,
    dtype: torch.dtype,
    d_model: int,
    generator: torch.Generator,
    selectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Standard normal rows [rows, d_model] on the generator's device, headed by what a layer's shift acts through.

    Args:
        rows: how many.
        dtype: of the result.
        d_model: model width.
        generator: draws the values.
        selectors: [rows, k], the first k values of each row; one that is 1 everywhere unless given.
    """
    x = torch.randn(rows, d_model, generator=generator, device=generator.device, dtype=torch.float32)
    x[:, : 1 if selectors is None else selectors.shape[1]] = 1 if selectors is None else selectors.to(x)
    return x.to(dtype)


def cache_bytes(device: torch.device) -> int:
    """Size of the device's largest cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * 2**20]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


def _random_rows(rows: int, columns: int, scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    blocks = _CPU_BLOCKS if generator.device.type == "cpu" else 1
    shape = (-(-rows // blocks), columns)
    # Not the default dtype and device: while vLLM builds a model, those are the model's.
    block = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).mul_(scale).to(dtype)
    return block.repeat(blocks, 1)[:rows].contiguous()
