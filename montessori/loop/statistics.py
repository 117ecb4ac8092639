"""Seeded intervals and tests on small samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from montessori.errors import ArgumentError

# Bounds the memory of one block of resamples: 64 MB of float64.
_BLOCK = 8_000_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its bootstrap interval (`tail_probability`); `n` values went in.

    Of a single value nothing but the value itself is known: both bounds are the mean. The bounds of fewer than five
    values are hardly more than the values themselves, and hold the true mean less often: of two, half of the time.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """mean(a) − mean(b) with its bootstrap interval.

    `p` is the one-sided p-value of "the mean of a is not above that of b": the share of permutations of the pooled
    values whose Welch's t is at least the one seen, counting the values themselves as one permutation. Of a plain
    difference the share would depend on which sample varies more (Janssen 1997).
    """

    difference: Interval
    p: float

    def to_dict(self) -> dict[str, Any]:
        return {"difference": self.difference.to_dict(), "p": self.p}


def bootstrap_mean(values: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """The mean of `values`, float [n], and its interval. Raises ArgumentError without finite values."""
    values = _checked(values, "values")
    means = _resampled_means(values, np.random.default_rng(seed), resamples)
    return _interval(float(values.mean()), means, tail_probability([values]), len(values))


def compare_means(a: np.ndarray, b: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """mean(a) − mean(b) of two independent samples. Raises ArgumentError when one has no finite values."""
    a, b = _checked(a, "a"), _checked(b, "b")
    rng = np.random.default_rng(seed)
    resampled = _resampled_means(a, rng, resamples) - _resampled_means(b, rng, resamples)
    seen = float(a.mean() - b.mean())
    difference = _interval(seen, resampled, tail_probability([a, b]), len(a) + len(b))
    pooled = np.concatenate([a, b])
    # A rearrangement of the same values must not lose against itself by a rounding of its sums.
    slack = 1e-12 * float(np.abs(pooled).max())
    found, above = _welch(a, b, slack), 1
    for _ in range(resamples):
        rng.shuffle(pooled)
        above += _welch(pooled[: len(a)], pooled[len(a) :], slack) >= found - 1e-9 * abs(found)
    return Comparison(difference, above / (resamples + 1))


def _welch(a: np.ndarray, b: np.ndarray, slack: float) -> float:
    """The difference of the means over its standard error, but for a single value, which has none."""
    difference = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return difference
    # `slack` is what rounding leaves of values that are the same.
    return difference / max(float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))), slack, 1e-300)


def tail_probability(samples: Sequence[np.ndarray]) -> float:
    """Quantile of resampled sums of means where the interval begins; it ends at one minus it.

    Percentiles of resamples of few values are too close together: resampling underestimates the variance by
    (n − 1) / n, and takes it for known. The expanded percentile interval (Hesterberg, What Teachers Should Know
    about the Bootstrap, 2015) makes up for both, with Student's t at Welch's degrees of freedom.
    """
    known = [sample for sample in samples if len(sample) > 1 and np.ptp(sample) > 0]
    if not known:
        return (1 - CONFIDENCE) / 2
    resampled = np.array([sample.var() / len(sample) for sample in known])
    free = np.array([len(sample) - 1 for sample in known])
    variance = resampled * (free + 1) / free
    freedom = variance.sum() ** 2 / (variance**2 / free).sum()
    ratio = np.sqrt(variance.sum() / resampled.sum())
    return float(stats.norm.sf(ratio * stats.t.isf((1 - CONFIDENCE) / 2, freedom)))


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64).ravel()
    if len(values) == 0 or not np.isfinite(values).all():
        raise ArgumentError(f"{name}: expected at least one value and all of them finite, got {values[:8].tolist()}")
    return values


def _resampled_means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    rows = max(1, _BLOCK // len(values))
    blocks = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        blocks.append(values[rng.integers(0, len(values), (count, len(values)))].mean(axis=1))
    return np.concatenate(blocks)


def _interval(mean: float, resampled: np.ndarray, tail: float, n: int) -> Interval:
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)
