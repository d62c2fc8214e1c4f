"""How long a step takes: a model that starts from the kernels' measured tables and is fitted to the steps of the running engine.

Steps that read prompts, and sparse and dense ones that only decode, follow different laws, so each kind has a fit of its own. All
are sums of non-negative terms: a step never gets shorter by carrying more, and what has not been seen is extrapolated upwards.
Residuals are relative, outliers are bounded (Huber), and each size of step keeps its own recent samples, so that the many small
steps do not make the model forget the few large ones. What changes for all steps alike, such as another program on the machine,
is followed by a factor.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from sparse_backend.ffn.paths import Timing
from sparse_backend.vllm_plugin.snapshot import PATHS, Path

Vector = npt.NDArray[np.float64]

_SAMPLES_PER_SIZE = 64
_SAMPLES_FOR_EXCESS = 16
_KEPT = 0.9  # of what was late, of kinds and lengths not run for a while: what is thought too long is not tried, and must be again
_REFIT_EVERY = 32
_REFIT_AT_FIRST = 4  # while there are few samples
_HUBER = 2.0  # residuals beyond so many times the median one count linearly
_HUBER_ROUNDS = 3
_PRIOR_SAMPLES = 1.0  # what the starting point weighs, for each coefficient
_PACE_SAMPLES = 9
_PACE_LIMITS = 0.5, 2.0
_ERRORS = 256
_STEPS_TO_KNOW = 64
_MOST = 0.9
_LEAST_S = 1e-6
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

_Size = int
"""Bits of the number of rows."""


_Length = int
"""Of a step, in half octaves of its predicted seconds."""


def _size(step: StepShape) -> _Size:
    return step.rows.bit_length()


def _length(seconds: float) -> _Length:
    return math.floor(2 * math.log2(max(seconds, _LEAST_S)))


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
        self._fits = {kind: _Fit(_prior(kind, table, scale)) for kind in get_args(_Kind)}
        self._errors: dict[Path, deque[float]] = {path: deque(maxlen=_ERRORS) for path in PATHS}

    def path(self, step: StepShape) -> Path:
        """The path a step takes."""
        return "sparse" if step.rows <= self._max_sparse_rows else "dense"

    def seconds(self, step: StepShape) -> float:
        """How long the step will take."""
        kind = self._kind(step)
        return self._fits[kind].seconds(_TERMS[kind](step))

    def most_seconds(self, step: StepShape) -> float:
        """What nine of ten steps that were predicted to be about as long stay below."""
        kind = self._kind(step)
        return self._fits[kind].most_seconds(_TERMS[kind](step))

    def knows(self, step: StepShape) -> bool:
        """Whether enough steps of its kind have been seen to choose by what is predicted of it."""
        return self._fits[self._kind(step)].observed >= _STEPS_TO_KNOW

    def observe(self, step: StepShape, seconds: float) -> None:
        """Learn how long a step took; it also enters the error of the predictions."""
        kind = self._kind(step)
        terms = _TERMS[kind](step)
        self._errors[self.path(step)].append(abs(self._fits[kind].seconds(terms) / seconds - 1))
        for other, fit in self._fits.items():
            if other == kind:
                fit.observe(terms, _size(step), seconds)
            else:
                fit.rest()

    def error(self, path: Path) -> float | None:
        """Median of |predicted - taken| / taken over a path's last steps, predicted before they ran; None without any."""
        errors = self._errors[path]
        return statistics.median(errors) if errors else None

    def _kind(self, step: StepShape) -> _Kind:
        return "prompts" if step.prefill_tokens else self.path(step)


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
    return _nonnegative(weighted.T @ weighted, weighted.sum(axis=0)) * scale * 1e-6


class _Fit:
    """Of one kind of steps."""

    def __init__(self, prior: Vector) -> None:
        self._prior = prior
        self._coefficients = prior
        self._places: dict[_Size, int] = {}
        """Which ring is of which size."""
        self._counts: list[int] = []
        """Samples of each size so far."""
        self._samples = np.empty((0, len(prior)))
        """Terms over seconds: what a perfect fit maps to 1. Rings of ``_SAMPLES_PER_SIZE``, one for each size of step."""
        self._latest: deque[Vector] = deque(maxlen=_PACE_SAMPLES)
        """The same, of the latest steps whatever their size."""
        self._pace = 1.0
        self._excess: dict[_Length, float] = {}
        """What nine of ten steps took, over their prediction, by that; at least 1. Lengths with enough samples.

        Not by size: it takes the host some 25 ms to launch a step of more than 512 rows. One that is read in 15 ms waits for that,
        and one of the same size whose decodes have long contexts does not.
        """
        self._predicted: set[_Length] = set()
        """Since the last fit."""
        self.observed = 0
        self._rested = 0
        """Steps of other kinds since the last of this one."""

    def seconds(self, terms: list[float]) -> float:
        return float(self._coefficients @ terms) * self._pace

    def most_seconds(self, terms: list[float]) -> float:
        # Of the nearest length: short steps, which wait for the host now and then, say nothing of long ones.
        seconds = self.seconds(terms)
        length = _length(seconds)
        nearest = min(self._excess, key=lambda known: (abs(known - length), -known), default=None)
        return seconds * (1.0 if nearest is None else self._excess[nearest])

    def observe(self, terms: list[float], size: _Size, seconds: float) -> None:
        self._rested = 0
        sample = np.array(terms) / seconds
        self._predicted.add(_length(self.seconds(terms)))
        self._keep(sample, size)
        self._latest.append(sample)
        self.observed += 1
        if self.observed % (_REFIT_AT_FIRST if self.observed < _REFIT_EVERY else _REFIT_EVERY) == 0:
            self._refit()
        if len(self._latest) == _PACE_SAMPLES:
            low, high = _PACE_LIMITS
            self._pace = min(max(1 / max(float(np.median(self._latest @ self._coefficients)), 1e-9), low), high)

    def rest(self) -> None:
        """A step of another kind was run."""
        self._rested += 1
        if self._rested % _REFIT_EVERY == 0:
            self._pace = 1 + _KEPT * (self._pace - 1)
            self._fade(self._excess)

    def _fade(self, lengths: Iterable[_Length]) -> None:
        for length in lengths:
            self._excess[length] = 1 + _KEPT * (self._excess[length] - 1)

    def _keep(self, sample: Vector, size: _Size) -> None:
        place = self._places.get(size)
        if place is None:
            place = self._places[size] = len(self._counts)
            self._counts.append(0)
            self._samples = np.vstack([self._samples, np.zeros((_SAMPLES_PER_SIZE, len(sample)))])
        self._samples[place * _SAMPLES_PER_SIZE + self._counts[place] % _SAMPLES_PER_SIZE] = sample
        self._counts[place] += 1

    def _refit(self) -> None:
        samples = self._samples[self._samples.any(axis=1)]
        weights = np.ones(len(samples))
        # The starting point counts as a sample in each coefficient's own direction.
        pull = _PRIOR_SAMPLES * (samples * samples).mean(axis=0)
        for _ in range(_HUBER_ROUNDS):
            weighted = samples * weights[:, None]
            fitted = _nonnegative(weighted.T @ samples + np.diag(pull), weighted.sum(axis=0) + pull * self._prior)
            predicted = samples @ fitted
            residuals = np.abs(predicted - 1)
            weights = np.minimum(1, _HUBER * np.median(residuals) / np.maximum(residuals, 1e-12))
        # And is all there is of those that no sample has.
        self._coefficients = np.where(pull, fitted, self._prior)
        self._fit_excess(samples)

    def _fit_excess(self, samples: Vector) -> None:
        of_taken = samples @ self._coefficients
        # The first term is one, its sample one over the seconds taken.
        lengths = np.array([_length(seconds) for seconds in of_taken / samples[:, 0]])
        self._fade(self._excess.keys() - self._predicted)
        for length in self._predicted:
            alike = of_taken[lengths == length]
            if len(alike) >= _SAMPLES_FOR_EXCESS:
                self._excess[length] = max(1.0, 1 / max(float(np.quantile(alike, 1 - _MOST)), 1e-3))
        self._predicted.clear()


def _nonnegative(gram: Vector, moment: Vector) -> Vector:
    """Least squares from its normal equations, without negative coefficients: negative ones are set to zero, worst first.

    So are those of terms that no sample has, which could be anything.
    """
    kept = np.flatnonzero(np.diag(gram)).tolist()
    result = np.zeros(len(moment))
    while kept:
        scale = np.sqrt(np.diag(gram)[kept])
        scaled = gram[np.ix_(kept, kept)] / scale[:, None] / scale[None, :]
        solved = np.linalg.lstsq(scaled, moment[kept] / scale, rcond=1e-12)[0]
        if (solved >= 0).all():
            result[kept] = solved / scale
            break
        kept.pop(int(np.argmin(solved)))
    return result
