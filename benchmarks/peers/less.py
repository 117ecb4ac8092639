"""In the style of LESS: one example at a time, its gradient through LESS's own Adam formula, dot with the reference.

LESS leaves the bias correction out, takes ε under the root, and compares by cosine after a random projection; here the
whole update is kept, and the dot product.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.peers.task import Task, adamw_step, batch_losses, reference_gradient
from montessori.batching import collate


class AdamDot:
    over_references = False
    same_units = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.covered = set(task.trainable)

    def prepare(self) -> None:
        self.q = reference_gradient(self.task, self.covered)

    def score(self) -> np.ndarray:
        scores = []
        for example in self.task.candidates:
            batch_losses(self.task.model, collate([example])).sum().backward()
            scores.append(sum(self._dot(name) for name in self.q))
            self.task.model.zero_grad()
        return np.array(scores)

    @torch.no_grad()
    def _dot(self, name: str) -> float:
        entry, step = self.task.state[name], adamw_step(self.task.state, name)
        grad = self.task.trainable[name].grad
        exp_avg = step.beta1 * entry.exp_avg + (1 - step.beta1) * grad
        exp_avg_sq = step.beta2 * entry.exp_avg_sq + (1 - step.beta2) * grad**2
        return float((self.q[name] * exp_avg / (exp_avg_sq + step.eps).sqrt()).sum())
