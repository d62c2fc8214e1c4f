"""Times that are sums of non-negative terms, fitted while they are measured.

Residuals are relative, outliers are bounded (Huber), and each size keeps its own recent samples, so that the many small ones do
not make the fit forget the few large ones.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

_SAMPLES_PER_SIZE = 64
_REFIT_EVERY = 32
_REFIT_AT_FIRST = 4  # while there are few samples
_HUBER = 2.0  # residuals beyond so many times the median one count linearly
_HUBER_ROUNDS = 3
_PRIOR_SAMPLES = 1.0  # what the starting point weighs, for each coefficient
# Residuals are relative to what was taken: a single sample that took far less than predicted would outweigh all others. With so
# many samples none is believed to have taken less than this share of its prediction.
_SETTLED, _SHORTEST = 64, 0.25
_PACE_SAMPLES = 9
_PACE_LIMITS = 0.5, 2.0
_LATENESS_SAMPLES = 16, 64  # at least, and the latest
_LATE = 0.95
_FORGET_EVERY = 32  # others: what is thought too long is not tried, and must be forgotten to be tried again
_KEPT = 0.98  # where they are of the same kind and other lengths
_KEPT_AT_REST = 0.9  # where they are of other kinds
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
        self.observed = 0

    def seconds(self, terms: Sequence[float]) -> float:
        """Predicted."""
        return float(self.coefficients @ terms)

    def observe(self, terms: Sequence[float], size: Size, seconds: float) -> None:
        """Learn how long it took."""
        if self.observed >= _SETTLED:
            seconds = max(seconds, _SHORTEST * self.seconds(terms))
        self._keep(np.array(terms) / seconds, size)
        self.observed += 1
        if self.observed % (_REFIT_AT_FIRST if self.observed < _REFIT_EVERY else _REFIT_EVERY) == 0:
            self._refit()

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
        if self._rested % _FORGET_EVERY == 0:
            self.factor = 1 + _KEPT_AT_REST * (self.factor - 1)


class Lateness:
    """What 19 of the latest 20 did not exceed, over what was predicted, by that.

    Not by size: launching a step without a CUDA graph keeps the host for some 30 ms. One that the device is done with in 15 waits
    for that, and one of the same size whose decodes have long contexts does not.
    """

    def __init__(self) -> None:
        self._ratios: dict[_Length, deque[float]] = {}
        """Taken over predicted, the latest of each length."""
        self._factors: dict[_Length, float] = {}
        """Of lengths with enough of them; at least 1."""
        self._fresh: set[_Length] = set()
        """Lengths observed since the factors were renewed."""
        self._observed = self._rested = 0

    def most(self, predicted: float) -> float:
        """What 19 of 20 stay below that are predicted to take about as long, in seconds."""
        length = _length(predicted)
        # Of the nearest length: short steps, which wait for the host now and then, say nothing of long ones.
        nearest = min(self._factors, key=lambda known: (abs(known - length), -known), default=None)
        return predicted * (1.0 if nearest is None else self._factors[nearest])

    def observe(self, predicted: float, seconds: float) -> None:
        """Learn how long it took."""
        self._rested = 0
        length = _length(predicted)
        self._ratios.setdefault(length, deque(maxlen=_LATENESS_SAMPLES[1])).append(seconds / max(predicted, _LEAST_S))
        self._fresh.add(length)
        self._observed += 1
        if self._observed % _FORGET_EVERY == 0:
            self._renew(_KEPT)

    def rest(self) -> None:
        """Something else was run."""
        self._rested += 1
        if self._rested % _FORGET_EVERY == 0:
            self._fresh.clear()
            self._renew(_KEPT_AT_REST)

    def _renew(self, kept: float) -> None:
        for length, ratios in self._ratios.items():
            if length in self._fresh and len(ratios) >= _LATENESS_SAMPLES[0]:
                self._factors[length] = max(1.0, float(np.quantile(ratios, _LATE)))
            elif length in self._factors:
                self._factors[length] = 1 + kept * (self._factors[length] - 1)
            if length not in self._fresh and ratios:
                ratios.popleft()
        self._fresh.clear()


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
