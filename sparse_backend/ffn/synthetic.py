"""Random layers whose neurons are active with a chosen probability, independently of each other: what timing runs on."""

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch

THRESHOLD = 0.0
"""The activation threshold these layers are made for: ReLU."""

_BLOCKS = 16  # random rows are drawn once and repeated so often: drawing all of them would take longer than timing them
_ALWAYS = 8.0  # standard deviations: no normal variable gets there


@dataclass(frozen=True)
class Layer:
    """Weights as the op takes them: gate_up [2 * d_ff, d_model], down_t [d_ff, d_model]."""

    gate_up: torch.Tensor
    down_t: torch.Tensor

    @classmethod
    def random(cls, dtype: torch.dtype, d_model: int, d_ff: int, generator: torch.Generator) -> "Layer":
        """Normal weights, scaled so that gate and up values have unit variance for the rows ``inputs`` makes."""
        gate_up = _random_rows(2 * d_ff, d_model, d_model**-0.5, dtype, generator)
        return cls(gate_up, _random_rows(d_ff, d_model, d_ff**-0.5, dtype, generator))

    def set_density(self, density: float) -> None:
        """Shift all gate values so that each is above ``THRESHOLD`` with this probability, for rows from ``inputs``."""
        shift = NormalDist().inv_cdf(density) if 0 < density < 1 else (-_ALWAYS if density <= 0 else _ALWAYS)
        self.gate_up[: self.down_t.shape[0], 0] = shift


def inputs(rows: int, dtype: torch.dtype, d_model: int, generator: torch.Generator) -> torch.Tensor:
    """Rows [rows, d_model] of standard normal values; the first is 1, through which ``Layer.set_density`` acts."""
    x = torch.randn(rows, d_model, generator=generator)
    x[:, 0] = 1
    return x.to(dtype)


def cache_bytes() -> int:
    """Size of the largest CPU cache; 32 MiB where the system does not tell."""
    sizes = [32 * 2**20]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


def _random_rows(rows: int, columns: int, scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    block = torch.randn(-(-rows // _BLOCKS), columns, generator=generator).mul_(scale).to(dtype)
    return block.repeat(_BLOCKS, 1)[:rows].contiguous()
