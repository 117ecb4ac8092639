"""How well predicted influences match those of real steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from montessori.errors import ArgumentError


@dataclass(frozen=True)
class Agreement:
    """Agreement of `num_examples` predicted influences with real ones of the same examples.

    `sign_agreement` is a share in [0, 1]; relative errors are |predicted − real| / |real|. Correlations
    are NaN when either side is constant.
    """

    num_examples: int
    pearson: float
    spearman: float
    sign_agreement: float
    median_relative_error: float
    max_relative_error: float

    @classmethod
    def of(cls, predicted: np.ndarray, real: np.ndarray) -> Agreement:
        """Both float [N] with N ≥ 2; raises ArgumentError otherwise."""
        if predicted.shape != real.shape or predicted.ndim != 1 or predicted.size < 2:
            raise ArgumentError(
                f"agreement: expected two arrays of one length >= 2, got {list(predicted.shape)} and {list(real.shape)}"
            )
        # A second of its own, which most of what imports this package does without.
        from scipy import stats

        varied = np.ptp(predicted) > 0 and np.ptp(real) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            # 0 where 0 was foreseen: a row of advantage 0, say.
            error = np.where(predicted == real, 0.0, np.abs(predicted - real) / np.abs(real))
        return cls(
            num_examples=predicted.size,
            pearson=float(stats.pearsonr(predicted, real)[0]) if varied else float("nan"),
            spearman=float(stats.spearmanr(predicted, real)[0]) if varied else float("nan"),
            sign_agreement=float(np.mean(np.sign(predicted) == np.sign(real))),
            median_relative_error=float(np.median(error)),
            max_relative_error=float(np.max(error)),
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
