"""dattri-llm: per-example gradients by its hook manager, raw or through its map of the AdamW update.

Only linear layers of the blocks: in Adam mode the manager refuses Hugging Face's RMSNorm, and it scores the two uses
of a tied embedding as two weights.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from dattri_llm import CaptureCallback, HookManager, HookManagerConfig
from dattri_llm.gradient.gradient import Gradient

from benchmarks.peers.task import Task, adamw_step, batch_losses, reference_gradient


class _Dattri:
    over_references = False
    scale = 1.0

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer | None) -> None:
        self.task, self.optimizer = task, optimizer
        self.covered = {f"{name}.weight" for name in task.block_linears}

    def prepare(self) -> None:
        layers = self.task.block_linears
        q = reference_gradient(self.task, self.covered)
        self.q = Gradient(
            representation=dict.fromkeys(layers, "materialized"),
            data={layer: q[f"{layer}.weight"].reshape(1, -1) for layer in layers},
            layer_types=dict.fromkeys(layers, "nn.Linear"),
        )
        self.callback = CaptureCallback()
        # Its own kind of layer that leaves autograd's weight gradients out.
        config = HookManagerConfig(invasive_linear_io=[f"^{re.escape(layer)}$" for layer in layers])
        self.manager = HookManager(self.task.model, config=config, callbacks=[self.callback], optimizer=self.optimizer)

    def score(self) -> np.ndarray:
        scores = []
        for batch in self.task.batches(self.task.candidates):
            with self.manager.collect():
                batch_losses(self.task.model, batch).sum().backward()
            self.task.model.zero_grad()
            scores.append(self.callback.record.gradient.similarity(self.q, reduce="all")[:, 0])
            # Or the next batch is captured beside this one.
            self.callback.record = None
        return torch.cat(scores).double().numpy() * self.scale


class ExactAdam(_Dattri):
    same_units = True

    def __init__(self, task: Task) -> None:
        super().__init__(task, task.optimizer)
        # Its direction is without the learning rate and weight decay.
        self.scale = adamw_step(task.state, next(iter(self.covered))).lr


class RawDot(_Dattri):
    same_units = False

    def __init__(self, task: Task) -> None:
        super().__init__(task, None)
