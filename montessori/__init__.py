"""What one optimizer step on each training candidate would do to a reference loss.

`InfluenceEstimator` scores candidates from one backward pass each; `montessori.ops` holds the kernels'
public entries; `montessori.reference` is the specification in plain torch.
"""

from __future__ import annotations

from montessori.estimator import InfluenceEstimator
from montessori.journal import ScoreJournal
from montessori.optim_state import AdamWState
from montessori.scores import Audit, Scores
from montessori.steps import AdamWStep, SGDStep

__all__ = ["AdamWState", "AdamWStep", "Audit", "InfluenceEstimator", "SGDStep", "ScoreJournal", "Scores"]
__version__ = "0.1.0"
