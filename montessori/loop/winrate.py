"""Win rate of one student's answers over another's from pairwise verdicts in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from montessori.errors import ArgumentError
from montessori.loop.statistics import Interval, bootstrap_mean

# Keeps the weights finite when every verdict agrees; its pull fades with the number of verdicts.
_RIDGE = 0.1


@dataclass(frozen=True)
class WinRate:
    """Share of prompts that the first set of answers wins, a tie counting half.

    `win_rate`: over both orders, with a bootstrap interval over prompts. `length_controlled`: the share at
    equal length, from a logistic regression on the difference in length. `first_position`: mean
    preference for the answer shown first; 0.5 is a judge without a bias for the position.
    """

    win_rate: Interval
    length_controlled: float
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


def _at_equal_length(preference: np.ndarray, difference: np.ndarray) -> float:
    """σ(w) of preference ~ σ(w + c · tanh(Δ / std Δ)), fitted by penalised cross-entropy on soft labels."""
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = weights[0] + weights[1] * x
        loss = np.logaddexp(0, z) - preference * z
        error = 1 / (1 + np.exp(-z)) - preference
        penalty = _RIDGE / 2 * float(weights @ weights)
        return float(loss.sum()) + penalty, np.array([error.sum(), error @ x]) + _RIDGE * weights

    fitted = minimize(objective, np.zeros(2), jac=True, method="L-BFGS-B")
    return float(1 / (1 + np.exp(-fitted.x[0])))
