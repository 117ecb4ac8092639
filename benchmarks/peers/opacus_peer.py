"""Opacus forms every example's whole gradient; the exact AdamW update and the dot product are ours, in torch."""

from __future__ import annotations

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule

from benchmarks.peers.task import Task, batch_losses, exact_adam_scores, reference_gradient
from montessori.batching import Batch


class ExactAdam:
    over_references = False
    same_units = True

    def __init__(self, task: Task) -> None:
        self.task = task
        self.covered = set(task.trainable)

    def prepare(self) -> None:
        self.q = reference_gradient(self.task, self.covered)
        # Its hooks refuse a model in eval mode; the model has no dropout.
        self.task.model.train()
        self.wrapped = GradSampleModule(self.task.model, loss_reduction="sum", strict=False)

    def score(self) -> np.ndarray:
        return np.concatenate([self._score_batch(batch) for batch in self.task.batches(self.task.candidates)])

    def _score_batch(self, batch: Batch) -> np.ndarray:
        batch_losses(self.wrapped, batch).sum().backward()
        total = torch.zeros(batch.size, dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in self.task.trainable.items():
                part = exact_adam_scores(self.task.state, name, parameter.grad_sample, parameter, self.q[name])
                total += part.double()
                parameter.grad = parameter.grad_sample = None
        return total.numpy()
