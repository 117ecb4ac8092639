"""What says that a candidate helps the student: its influence, or one of the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import model_validator
from typing_extensions import Self

from montessori.errors import ArgumentError
from montessori.loop.section import Section
from montessori.scores import Scores


class SignalSettings(Section):
    """Which signal tells helpful from harmful.

    "influence": of the scores. "training_loss": the student's own loss on the candidate, above the median
    being helpful (it still has to learn it), or below with `prefer="low"`. "judge": a grade by a language
    model. "random": a coin.
    """

    kind: Literal["influence", "training_loss", "judge", "random"] = "influence"
    prefer: Literal["high", "low"] = "high"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prefer == "low" and self.kind != "training_loss":
            raise ValueError(f"prefer=low: expected kind=training_loss, which alone has two sides, got {self.kind}")
        return self


@dataclass(frozen=True)
class Signal:
    """One value per candidate, float64 [N]: above 0 helpful, below 0 harmful, NaN where there is none.

    `centred` are the values without what all candidates share: for influence the drift; the other signals
    are centred on their median already.
    """

    name: str
    values: np.ndarray
    centred: np.ndarray


def from_scores(settings: SignalSettings, scores: Scores, seed: int) -> Signal:
    """The signal of scored candidates. With several reference sets the influence is the mean over them.

    Raises ArgumentError for kind "judge", whose grades are no part of the scores.
    """
    if settings.kind == "influence":
        mean = [values.reshape(len(scores), -1).mean(axis=1) for values in (scores.influence, scores.centred)]
        return Signal("influence", *mean)
    if settings.kind == "training_loss":
        return around_median("training_loss", scores.loss if settings.prefer == "high" else -scores.loss)
    if settings.kind == "random":
        # On the candidates that the influence would have valued.
        draws = np.where(scores.ok, np.random.default_rng(seed).standard_normal(len(scores)), np.nan)
        return Signal("random", draws, draws)
    raise ArgumentError("signal.kind=judge: expected grades by a judge, got scores of influence")


def around_median(name: str, values: Sequence[float] | np.ndarray) -> Signal:
    """A signal whose sign says on which side of the median a value lies; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    centred = values - (np.median(finite) if len(finite) else 0.0)
    return Signal(name, centred, centred)
