"""montessori itself: the default backend, all parameters or those that the others cover; and the real step."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.task import Task
from montessori import InfluenceEstimator
from montessori.batching import Example
from montessori.optim_state import AdamWState


def _rows(examples: list[Example]) -> list[dict[str, list[int]]]:
    return [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]


class Montessori:
    """`InfluenceEstimator` with its defaults."""

    over_references = False
    same_units = True
    method = "anchored"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.covered = {name for name, parameter in task.trainable.items() if parameter.requires_grad}
        self.candidates = _rows(task.candidates)
        state = AdamWState({name: task.state[name] for name in self.covered})
        self.estimator = InfluenceEstimator(task.model, state, _rows(task.references), self.method)

    def prepare(self) -> None:
        self.estimator.prepare(self.candidates)

    def score(self) -> np.ndarray:
        longest = max(example.num_tokens for example in self.task.candidates)
        return self.estimator.score(self.candidates, batch_tokens=self.task.batch_size * longest).influence


class FirstOrder(Montessori):
    """Without the anchor: the mathematics of the exact Adam peers."""

    method = "first_order"


class BlockLinears(Montessori):
    """On the parameters that the hook libraries cover; the others are frozen."""

    method = "first_order"

    def __init__(self, task: Task) -> None:
        covered = {f"{name}.weight" for name in task.block_linears}
        for name, parameter in task.trainable.items():
            parameter.requires_grad_(name in covered)
        super().__init__(task)


class RealStep(Montessori):
    """One real float32 step on each candidate: the truth that the others are compared with."""

    method = "exact"
    over_references = True

    def prepare(self) -> None:
        """Nothing is shared between candidates but the loss before the step, which `score` computes."""
