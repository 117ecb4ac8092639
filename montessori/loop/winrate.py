"""Win rate of one student's answers over another's from pairwise verdicts in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from montessori.errors import ArgumentError
from montessori.loop.statistics import Interval, bootstrap_mean

# Keeps the weight of the length finite where it decides every verdict; its pull fades with the number of verdicts.
_RIDGE = 0.1
_LARGEST = 30.0  # weight: a rate of 1 or 0 to the last bit but few


@dataclass(frozen=True)
class WinRate:
    """Share of prompts that the first set of answers wins, a tie counting half.

    `win_rate`: over both orders, with a bootstrap interval over prompts. `length_controlled`: the share at
    equal length, from a logistic regression on the difference in length, None where all differences are the same
    and not 0, which tells nothing of equal lengths. `first_position`: mean
    preference for the answer shown first; 0.5 is a judge without a bias for the position.
    """

    win_rate: Interval
    length_controlled: float | None
    first_position: float
    mean_length: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def win_rate(
    shown_first: Sequence[float],
    shown_second: Sequence[float],
    lengths: Sequence[int],
    other_lengths: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> WinRate:
    """Win rate from the judge's preference for our answer, in [0, 1], per prompt and order.

    `shown_first[i]` is the preference for our answer to prompt i when it stands first, `shown_second[i]`
    when it stands second. `lengths`, `other_lengths`: characters of both answers.
    `seed` and `resamples` are those of the bootstrap.
    Raises ArgumentError for unequal lengths of the lists or preferences outside [0, 1].
    """
    first, second = np.asarray(shown_first, dtype=np.float64), np.asarray(shown_second, dtype=np.float64)
    ours, theirs = np.asarray(lengths, dtype=np.float64), np.asarray(other_lengths, dtype=np.float64)
    if not len(first) == len(second) == len(ours) == len(theirs) or len(first) == 0:
        raise ArgumentError(
            f"expected the same number of preferences and lengths, at least 1, got {len(first)}, {len(second)}, "
            f"{len(ours)}, {len(theirs)}"
        )
    preference = (first + second) / 2
    if not all((side >= 0).all() and (side <= 1).all() for side in (first, second)):
        raise ArgumentError("expected preferences between 0 and 1: 1 for a win, 0.5 for a tie, 0 for a loss")
    return WinRate(
        win_rate=bootstrap_mean(preference, seed=seed, resamples=resamples),
        length_controlled=_at_equal_length(preference, ours - theirs),
        first_position=float((first.mean() + 1 - second.mean()) / 2),
        mean_length=(float(ours.mean()), float(theirs.mean())),
    )


def _at_equal_length(preference: np.ndarray, difference: np.ndarray) -> float | None:
    """σ(w) of preference ~ σ(w + c · tanh(Δ / std Δ)), fitted by cross-entropy on soft labels with a penalty on c."""
    spread = difference.std()
    if spread == 0:
        return None if difference.any() else float(preference.mean())
    x = np.tanh(difference / spread)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = weights[0] + weights[1] * x
        loss = np.logaddexp(0, z) - preference * z
        error = 1 / (1 + np.exp(-z)) - preference
        penalty = _RIDGE / 2 * float(weights[1] ** 2)
        return float(loss.sum()) + penalty, np.array([error.sum(), error @ x + _RIDGE * weights[1]])

    bounds = [(-_LARGEST, _LARGEST)] * 2
    fitted = minimize(objective, np.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds)
    return float(1 / (1 + np.exp(-fitted.x[0])))
