"""Times that are sums of non-negative terms, fitted while they are measured.

Residuals are relative, outliers are bounded (Huber), and each size keeps its own recent samples, so that the many small ones do
not make the fit forget the few large ones.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_SAMPLES_PER_SIZE = 64
_SAMPLES_FOR_EXCESS = 16
_KEPT = 0.9  # of what was late: what is thought too long is not tried, so that it must be forgotten for it to be tried again
_REFIT_EVERY = 32
_REFIT_AT_FIRST = 4  # while there are few samples
_HUBER = 2.0  # residuals beyond so many times the median one count linearly
_HUBER_ROUNDS = 3
_PRIOR_SAMPLES = 1.0  # what the starting point weighs, for each coefficient
_PACE_SAMPLES = 9
_PACE_LIMITS = 0.5, 2.0
_MOST = 0.9
_LEAST_S = 1e-6

Size = int
"""Samples of one are kept together."""
_Length = int
"""Half octaves of predicted seconds."""


def _length(seconds: float) -> _Length:
    return math.floor(2 * math.log2(max(seconds, _LEAST_S)))


class Fit:
    """Times as a sum of terms."""

    def __init__(self, prior: Vector) -> None:
        """Start from these coefficients, [terms], in seconds; the first term is always one."""
        self._prior = prior
        self.coefficients = prior
        self._places: dict[Size, int] = {}
        """Which ring is of which size."""
        self._counts: list[int] = []
        """Samples of each size so far."""
        self._samples = np.empty((0, len(prior)))
        """Terms over seconds: what a perfect fit maps to 1. Rings of ``_SAMPLES_PER_SIZE``, one for each size."""
        self._excess: dict[_Length, float] = {}
        """What nine of ten took, over their prediction, by that; at least 1. Lengths with enough samples.

        Not by size: launching a step without a CUDA graph keeps the host for some 30 ms. One that the device is done with in 15
        waits for that, and one of the same size whose decodes have long contexts does not.
        """
        self._predicted: set[_Length] = set()
        """Since the last fit."""
        self.observed = 0
        self._rested = 0

    def seconds(self, terms: Sequence[float]) -> float:
        """Predicted."""
        return float(self.coefficients @ terms)

    def most_seconds(self, terms: Sequence[float]) -> float:
        """What nine of ten that are predicted to take about as long stay below."""
        # Of the nearest length: short steps, which wait for the host now and then, say nothing of long ones.
        seconds = self.seconds(terms)
        length = _length(seconds)
        nearest = min(self._excess, key=lambda known: (abs(known - length), -known), default=None)
        return seconds * (1.0 if nearest is None else self._excess[nearest])

    def observe(self, terms: Sequence[float], size: Size, seconds: float) -> None:
        """Learn how long it took."""
        self._rested = 0
        self._predicted.add(_length(self.seconds(terms)))
        self._keep(np.array(terms) / seconds, size)
        self.observed += 1
        if self.observed % (_REFIT_AT_FIRST if self.observed < _REFIT_EVERY else _REFIT_EVERY) == 0:
            self._refit()

    def rest(self) -> None:
        """Something else was run."""
        self._rested += 1
        if self._rested % _REFIT_EVERY == 0:
            self._fade(self._excess)

    def _fade(self, lengths: Iterable[_Length]) -> None:
        for length in lengths:
            self._excess[length] = 1 + _KEPT * (self._excess[length] - 1)

    def _keep(self, sample: Vector, size: Size) -> None:
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
            fitted = nonnegative(weighted.T @ samples + np.diag(pull), weighted.sum(axis=0) + pull * self._prior)
            predicted = samples @ fitted
            residuals = np.abs(predicted - 1)
            weights = np.minimum(1, _HUBER * np.median(residuals) / np.maximum(residuals, 1e-12))
        # And is all there is of those that no sample has.
        self.coefficients = np.where(pull, fitted, self._prior)
        self._fit_excess(samples)

    def _fit_excess(self, samples: Vector) -> None:
        of_taken = samples @ self.coefficients
        # The first term is one, its sample one over the seconds taken.
        lengths = np.array([_length(seconds) for seconds in of_taken / samples[:, 0]])
        self._fade(self._excess.keys() - self._predicted)
        for length in self._predicted:
            alike = of_taken[lengths == length]
            if len(alike) >= _SAMPLES_FOR_EXCESS:
                self._excess[length] = max(1.0, 1 / max(float(np.quantile(alike, 1 - _MOST)), 1e-3))
        self._predicted.clear()


class Pace:
    """What changes all times alike for a while, such as another program on the machine, as a factor."""

    def __init__(self) -> None:
        self._latest: deque[Vector] = deque(maxlen=_PACE_SAMPLES)
        """Terms over seconds, whatever their size."""
        self._rested = 0
        self.factor = 1.0

    def observe(self, terms: Sequence[float], seconds: float, coefficients: Vector) -> None:
        """Learn how long it took, where these coefficients are the fit's."""
        self._rested = 0
        self._latest.append(np.array(terms) / seconds)
        if len(self._latest) == _PACE_SAMPLES:
            low, high = _PACE_LIMITS
            self.factor = min(max(1 / max(float(np.median(self._latest @ coefficients)), 1e-9), low), high)

    def rest(self) -> None:
        """Something else was run."""
        self._rested += 1
        if self._rested % _REFIT_EVERY == 0:
            self.factor = 1 + _KEPT * (self.factor - 1)


def nonnegative(gram: Vector, moment: Vector) -> Vector:
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
