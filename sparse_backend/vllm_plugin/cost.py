"""How long a step takes: a model that starts from the kernels' measured tables and is fitted to the steps of the running engine.

Steps that read prompts, and sparse and dense ones that only decode, follow different laws, so each kind has a fit of its own. All
are sums of non-negative terms: a step never gets shorter by carrying more, and what has not been seen is extrapolated upwards.
What changes for all steps alike is followed by a factor, for prompts by themselves another than for prompts beside decodes.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np

from sparse_backend.ffn.paths import Timing
from sparse_backend.vllm_plugin.fit import Fit, Lateness, Pace, Size, Vector, nonnegative
from sparse_backend.vllm_plugin.snapshot import PATHS, Path

_ERRORS = 256
_STEPS_TO_KNOW = 64
_KNEES = 64, 256  # rows from which on a dense product is limited by arithmetic more and more


@dataclass(frozen=True)
class StepShape:
    """What a step's time depends on."""

    rows: int
    """Token rows, of decodes and prefills together."""
    prefill_tokens: int = 0
    context: int = 0
    """Tokens in the caches that the decoding rows attend to, summed over them."""
    prefill_context: int = 0
    """For each token of a prefill the tokens before it, summed."""
    union: float = 1.0
    """Share of neurons active for at least one row, mean over layers."""
    after_prefill: bool = False
    """Whether the step before read prompts: it keeps the host for longer, and leaves less in the caches."""


@dataclass(frozen=True)
class LayerTable:
    """What was measured of one layer's time; either list may be empty."""

    sparse: Sequence[tuple[int, float, float]]
    """Rows, union, microseconds."""
    dense: Sequence[tuple[int, float]]
    """Rows, microseconds."""

    @classmethod
    def of(cls, timings: Mapping[float, Sequence[Timing]]) -> Self:
        """From times by density, neurons being active independently."""
        return cls(
            sparse=[
                (timing.rows, 1 - (1 - density) ** timing.rows, timing.sparse_us)
                for density, of_density in timings.items()
                for timing in of_density
            ],
            dense=[(timing.rows, timing.dense_us) for of_density in timings.values() for timing in of_density],
        )


def layer_scale(n_layers: int, d_model: int, d_ff: int, vocab_size: int) -> float:
    """A LLaMA's weights over those of one of its feed-forward layers."""
    layer = 3 * d_model * d_ff
    return n_layers * (1 + 4 * d_model**2 / layer) + vocab_size * d_model / layer


def union_of(densities: Sequence[float]) -> float:
    """Share of neurons active for at least one of independent rows of these densities."""
    return 1.0 - float(np.prod(1.0 - np.asarray(densities, dtype=np.float64)))


def _sparse_terms(step: StepShape) -> list[float]:
    return [1.0, step.union, float(step.rows), step.context * 1e-6, float(step.after_prefill)]


def _dense_terms(step: StepShape) -> list[float]:
    return [
        1.0,
        float(step.rows),
        *(float(max(0, step.rows - knee)) for knee in _KNEES),
        step.context * 1e-6,
        float(step.after_prefill),
    ]


def _prompt_terms(step: StepShape) -> list[float]:
    # Beside prompts, which the attention kernel is launched for, a decoding row and its context cost more than by themselves.
    decoding = float(step.rows - step.prefill_tokens)
    return [*_dense_terms(step), decoding, step.prefill_context * 1e-6]


_Kind = Literal["sparse", "dense", "prompts"]
_TERMS: dict[_Kind, Callable[[StepShape], list[float]]] = {
    "sparse": _sparse_terms,
    "dense": _dense_terms,
    "prompts": _prompt_terms,
}


def _size(step: StepShape) -> Size:
    return step.rows.bit_length()


class StepCost:
    """Predicts seconds per step, and learns from each.

    Not for several threads.
    """

    def __init__(self, table: LayerTable, *, scale: float, max_sparse_rows: int) -> None:
        """Start from the table.

        Args:
            table: times of one feed-forward layer.
            scale: the model's weights over those of that layer.
            max_sparse_rows: steps of at most this many rows take the sparse path.
        """
        self._max_sparse_rows = max_sparse_rows
        self._fits = {kind: Fit(_prior(kind, table, scale)) for kind in get_args(_Kind)}
        self._paces: defaultdict[tuple[_Kind, bool], Pace] = defaultdict(Pace)
        """By kind, and by whether the step has nothing but prompts."""
        self._lateness = {kind: Lateness() for kind in get_args(_Kind)}
        self._errors: dict[Path, deque[float]] = {path: deque(maxlen=_ERRORS) for path in PATHS}

    def path(self, step: StepShape) -> Path:
        """The path a step takes."""
        return "sparse" if step.rows <= self._max_sparse_rows else "dense"

    def seconds(self, step: StepShape) -> float:
        """How long the step will take."""
        kind = self._kind(step)
        return self._fits[kind].seconds(_TERMS[kind](step)) * self._pace(step).factor

    def times(self, step: StepShape) -> tuple[float, float]:
        """``seconds``, and what 19 of 20 steps stay below that are predicted to take about as long."""
        expected = self.seconds(step)
        return expected, self._lateness[self._kind(step)].most(expected)

    def knows(self, step: StepShape) -> bool:
        """Whether enough steps of its kind have been seen to choose by what is predicted of it."""
        return self._fits[self._kind(step)].observed >= _STEPS_TO_KNOW

    def observe(self, step: StepShape, seconds: float) -> None:
        """Learn how long a step took; it also enters the error of the predictions."""
        kind, pace = self._kind(step), self._pace(step)
        terms = _TERMS[kind](step)
        predicted = self._fits[kind].seconds(terms) * pace.factor
        self._errors[self.path(step)].append(abs(predicted / seconds - 1))
        self._fits[kind].observe(terms, _size(step), seconds)
        lateness = self._lateness[kind]
        lateness.observe(predicted, seconds)
        pace.observe(terms, seconds, self._fits[kind].coefficients)
        everything: list[Lateness | Pace] = [*self._lateness.values(), *self._paces.values()]
        for other in everything:
            if other is not lateness and other is not pace:
                other.rest()

    def error(self, path: Path) -> float | None:
        """Median of |predicted - taken| / taken over a path's last steps, predicted before they ran; None without any."""
        errors = self._errors[path]
        return statistics.median(errors) if errors else None

    def _kind(self, step: StepShape) -> _Kind:
        return "prompts" if step.prefill_tokens else self.path(step)

    def _pace(self, step: StepShape) -> Pace:
        return self._paces[self._kind(step), step.rows == step.prefill_tokens]


def _prior(kind: _Kind, table: LayerTable, scale: float) -> Vector:
    """Coefficients in seconds: a least-squares fit to the table; a millisecond per step where there is none."""
    if kind == "sparse":
        steps = [StepShape(rows, union=union) for rows, union, _ in table.sparse]
        times = np.array([us for _, _, us in table.sparse])
    else:
        steps = [StepShape(rows, rows if kind == "prompts" else 0) for rows, _ in table.dense]
        times = np.array([us for _, us in table.dense])
    if not steps:
        return np.array([1e-3] + [0.0] * (len(_TERMS[kind](StepShape(1))) - 1))
    terms = np.array([_TERMS[kind](step) for step in steps])
    weighted = terms / times[:, None]
    return nonnegative(weighted.T @ weighted, weighted.sum(axis=0)) * scale * 1e-6
