"""`torch.func.vmap(grad)` forms every example's whole gradient; the exact AdamW update and the dot product are ours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.peers.task import Task, exact_adam_scores, mean_losses, reference_gradient


class ExactAdam:
    over_references = False
    same_units = True

    def __init__(self, task: Task) -> None:
        self.task = task
        self.covered = set(task.trainable)
        # The fused attention has no rule for vmap.
        task.model.set_attn_implementation("eager")

    def prepare(self) -> None:
        self.q = reference_gradient(self.task, self.covered)

    def score(self) -> np.ndarray:
        parameters = {name: parameter.detach() for name, parameter in self.task.trainable.items()}
        per_example = vmap(grad(self._loss), in_dims=(None, 0, 0, 0))
        scores = []
        for batch in self.task.batches(self.task.candidates):
            grads = per_example(parameters, batch.input_ids, batch.attention_mask, batch.labels)
            total = torch.zeros(batch.size, dtype=torch.float64)
            for name in list(grads):
                part = exact_adam_scores(self.task.state, name, grads.pop(name), parameters[name], self.q[name])
                total += part.double()
            scores.append(total.numpy())
        return np.concatenate(scores)

    def _loss(self, parameters: dict[str, Tensor], input_ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        def model(**inputs):
            return functional_call(self.task.model, parameters, kwargs=inputs, tie_weights=True)

        return mean_losses(model, input_ids[None], mask[None], labels[None])[0]
