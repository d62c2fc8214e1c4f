"""Which neurons are active in a benchmark: at random, as often as those of a real model, or as they once were recorded."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from sparse_backend.checkpoint import MANIFEST_NAME, Manifest
from sparse_backend.errors import UserError
from sparse_backend.ffn import synthetic


class Pattern(Protocol):
    """Decides over a layer's gate values; the weights stay random otherwise."""

    def density(self, layer_index: int) -> float:
        """Mean share of active neurons per row that a layer is meant to have."""

    def apply(self, layer: synthetic.Layer, layer_index: int, rows: int, generator: torch.Generator) -> None:
        """Set a layer's gate for the next ``rows`` rows from ``inputs``. The generator is one for the CPU."""

    def inputs(self, rows: int, dtype: torch.dtype, d_model: int, generator: torch.Generator) -> torch.Tensor:
        """Rows [rows, d_model] on the generator's device."""


@dataclass(frozen=True)
class Independent:
    """Every neuron active with the same probability, independently of all others."""

    share: float

    def density(self, layer_index: int) -> float:
        """The share, for every layer."""
        return self.share

    def apply(self, layer: synthetic.Layer, layer_index: int, rows: int, generator: torch.Generator) -> None:
        """Shift the whole gate by the same."""
        layer.set_density(self.share)

    def inputs(self, rows: int, dtype: torch.dtype, d_model: int, generator: torch.Generator) -> torch.Tensor:
        """Random rows."""
        return synthetic.inputs(rows, dtype, d_model, generator)


@dataclass(frozen=True)
class Frequencies:
    """Each neuron active as often as one of a real model, independently for each row.

    Layer i takes the frequencies of the model's layer i, the layers over again where there are more; its neurons are drawn from
    the model's with replacement.
    """

    table: torch.Tensor
    """[layers of the model, its d_ff], float32, shares of tokens."""

    def density(self, layer_index: int) -> float:
        """Mean frequency of the model's layer."""
        return self._of(layer_index).mean().item()

    def apply(self, layer: synthetic.Layer, layer_index: int, rows: int, generator: torch.Generator) -> None:
        """Draw the layer's neurons."""
        layer.set_frequencies(self.draw(layer_index, layer.d_ff, generator))

    def draw(self, layer_index: int, d_ff: int, generator: torch.Generator) -> torch.Tensor:
        """Frequencies of ``d_ff`` neurons drawn from the model's layer."""
        frequencies = self._of(layer_index)
        return frequencies[_draw(frequencies.shape[0], d_ff, generator)]

    def inputs(self, rows: int, dtype: torch.dtype, d_model: int, generator: torch.Generator) -> torch.Tensor:
        """Random rows."""
        return synthetic.inputs(rows, dtype, d_model, generator)

    def _of(self, layer_index: int) -> torch.Tensor:
        return self.table[layer_index % self.table.shape[0]]


@dataclass(frozen=True)
class Recorded:
    """Neurons active as in rows drawn from a recording, each layer's rows drawn anew.

    A layer as wide as the recording takes its neurons as they are; another draws them with replacement, the same for all its
    rows, so that what rows have in common stays.
    """

    masks: torch.Tensor
    """[recorded rows, recorded d_ff], bool."""
    most_rows: int
    """Rows of the widest call to come: each needs an input coordinate of its own, by which the gate tells it from the others."""

    def density(self, layer_index: int) -> float:
        """Share of active neurons in the whole recording."""
        return self.masks.float().mean().item()

    def apply(self, layer: synthetic.Layer, layer_index: int, rows: int, generator: torch.Generator) -> None:
        """Draw rows, none again before all were."""
        recorded, d_ff = self.masks.shape
        repeats = -(-rows // recorded)
        chosen = torch.cat([torch.randperm(recorded, generator=generator) for _ in range(repeats)])[:rows]
        masks = self.masks[chosen]
        if d_ff != layer.d_ff:
            masks = masks[:, _draw(d_ff, layer.d_ff, generator)]
        shift = torch.zeros(layer.d_ff, self.most_rows, dtype=torch.float32)
        shift[:, :rows] = torch.where(masks.t(), synthetic.ALWAYS, -synthetic.ALWAYS)
        layer.set_shift(shift)

    def inputs(self, rows: int, dtype: torch.dtype, d_model: int, generator: torch.Generator) -> torch.Tensor:
        """Random rows, headed by a 1 at the row's own coordinate."""
        return synthetic.inputs(rows, dtype, d_model, generator, torch.eye(rows, self.most_rows, dtype=torch.float32))


def _draw(among: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(among, (count,), generator=generator)


@dataclass(frozen=True)
class PatternArgument:
    """The value of --pattern, not read yet."""

    kind: Literal["independent", "frequencies", "recorded"]
    file: Path | None

    def __str__(self) -> str:
        return self.kind if self.file is None else f"{self.kind}={self.file.name}"


def pattern_argument(text: str) -> PatternArgument:
    """Parse ``independent``, ``frequencies=FILE`` or ``recorded=FILE``."""
    kind, separator, file = text.partition("=")
    if text == "independent":
        return PatternArgument("independent", None)
    if kind in ("frequencies", "recorded") and separator and file:
        return PatternArgument("frequencies" if kind == "frequencies" else "recorded", Path(file))
    raise argparse.ArgumentTypeError(f"{text!r} is none of independent, frequencies=FILE and recorded=FILE")


def read_frequencies(file: Path) -> torch.Tensor:
    """How often each neuron of a model is active: float32 [layers, d_ff].

    Args:
        file: a checkpoint's ``prosparse.json``, or an .npz with an array ``freq_all``.

    Raises:
        UserError: it is neither, or holds other numbers than shares.
    """
    try:
        if file.name == MANIFEST_NAME:
            manifest = Manifest.model_validate_json(file.read_bytes())
            table = torch.tensor([layer.neuron_frequency for layer in manifest.layers], dtype=torch.float32)
        else:
            with np.load(file) as arrays:
                table = torch.from_numpy(arrays["freq_all"]).float()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read as frequencies: {error}. Give a checkpoint's {MANIFEST_NAME}, or an .npz with an array"
            " freq_all of the shape layers x neurons."
        ) from None
    if table.dim() != 2 or not ((table >= 0) & (table <= 1)).all():
        raise UserError(f"{file} must hold shares from 0 to 1 in a table of layers x neurons; it does not.")
    return table


def read_recording(file: Path) -> torch.Tensor:
    """Which neurons were active in recorded inputs of a down projection: bool [rows, d_ff].

    Raises:
        UserError: it is no .npy matrix.
    """
    try:
        values = np.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a recording: {error}. Give an .npy of rows x neurons.") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or 0 in values.shape:
        raise UserError(f"{file} must hold a matrix of rows x neurons; it does not.")
    return torch.from_numpy(values != 0)
