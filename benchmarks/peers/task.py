"""What every peer is given, and the mathematics that several of them share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from montessori.batching import Batch, Example, collate
from montessori.checkpoints import read_state
from montessori.models import load_model
from montessori.naive import make_adamw
from montessori.optim_state import AdamWState
from montessori.steps import AdamWStep


class Peer(Protocol):
    """A way to score candidates.

    `covered`: names of the parameters whose gradient enters the score. `over_references`: whether `score` also
    passes over the references, which `prepare` does for the others. `same_units`: whether scores are changes of
    the reference loss.
    """

    covered: set[str]
    over_references: bool
    same_units: bool

    def prepare(self) -> None:
        """What is computed once for all candidates."""

    def score(self) -> np.ndarray:
        """float64 [N], larger is better, in the order of the task's candidates."""


@dataclass
class Task:
    """A warmed-up model in eval mode, its live optimizer, and examples, longest first."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    state: AdamWState
    candidates: list[Example]
    references: list[Example]
    batch_size: int

    @classmethod
    def load(cls, path: Path) -> Task:
        """The task that `save` wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        model, _ = load_model(record["checkpoint"])
        state = read_state(record["checkpoint"], model)
        examples = {
            name: [
                Example(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), index)
                for index, row in enumerate(record[name])
            ]
            for name in ("candidates", "references")
        }
        return cls(model, make_adamw(model, state), state, **examples, batch_size=record["batch_size"])

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def block_linears(self) -> list[str]:
        """Names of the linear layers inside the blocks: all but the vocabulary head."""
        return [
            name for name, module in self.model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
        ]

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        size = self.batch_size
        return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]


def save(
    path: Path, checkpoint: Path, candidates: Sequence[Example], references: Sequence[Example], batch_size: int
) -> str:
    """Write a task file, and return a digest of its examples and batches. Each list is put longest first, so that
    batches have little padding."""

    def rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        ordered = sorted(examples, key=lambda example: (-example.num_tokens, example.index))
        return [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in ordered]

    task: dict[str, Any] = {"candidates": rows(candidates), "references": rows(references), "batch_size": batch_size}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"checkpoint": str(checkpoint), **task}), encoding="utf-8")
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


def mean_losses(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """[B] mean token loss over the labelled tokens of each example, by the model's ordinary forward."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1)


def batch_losses(model: nn.Module, batch: Batch) -> Tensor:
    """`mean_losses` of a batch."""
    return mean_losses(model, batch.input_ids, batch.attention_mask, batch.labels)


def reference_gradient(task: Task, names: set[str]) -> dict[str, Tensor]:
    """q of the named parameters: gradient of the mean of the references' mean losses, by plain backward passes."""
    parameters = {name: parameter for name, parameter in task.trainable.items() if name in names}
    task.model.zero_grad()
    for batch in task.batches(task.references):
        (batch_losses(task.model, batch).sum() / len(task.references)).backward()
    q = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    task.model.zero_grad()
    return q


def adamw_step(state: AdamWState, name: str) -> AdamWStep:
    """Hyperparameters of the next step of a parameter; peers know AdamW alone."""
    step = state[name].step
    if not isinstance(step, AdamWStep):
        raise TypeError(f"{name}: expected the state of AdamW, got {step}")
    return step


def exact_adam_scores(state: AdamWState, name: str, grads: Tensor, parameter: Tensor, q: Tensor) -> Tensor:
    """[B] score of one parameter from its per-example gradients [B, ...]: −⟨q, Δ(g)⟩, Eq. 1 and 3."""
    step, entry = adamw_step(state, name), state[name]
    exp_avg = torch.lerp(entry.exp_avg, grads, 1 - step.beta1) / (1 - step.beta1**step.step)
    exp_avg_sq = (step.beta2 * entry.exp_avg_sq + (1 - step.beta2) * grads**2) / (1 - step.beta2**step.step)
    update = exp_avg / (exp_avg_sq.sqrt() + step.eps) + step.weight_decay * parameter
    return step.lr * (update.flatten(1) @ q.flatten())
