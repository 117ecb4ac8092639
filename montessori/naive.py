"""Two naive loops, driven by torch's own optimizer: baselines for speed, and an independent truth.

Both take one real `optimizer.step()` per candidate and evaluate the whole reference set after it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from montessori.batching import IGNORE_INDEX, Example, collate
from montessori.checkpoints import read_state
from montessori.errors import ArgumentError
from montessori.losses import response_loss
from montessori.models import load_model
from montessori.optim_state import AdamWState
from montessori.passes import evaluation_mode, gradients_aside
from montessori.referenceset import ReferenceSets
from montessori.steps import AdamWStep


def make_adamw(model: nn.Module, state: AdamWState) -> torch.optim.AdamW:
    """A real `torch.optim.AdamW` over the trainable parameters that stands where `state` stands."""
    parameters = dict(model.named_parameters())
    groups, saved = [], {}
    for position, (name, entry) in enumerate(state.items()):
        step = entry.step
        if not isinstance(step, AdamWStep) or not step.decoupled or entry.exp_avg is None or entry.exp_avg_sq is None:
            raise ArgumentError(f"{name}: expected the state of AdamW, got {step}")
        groups.append(
            {
                "params": [parameters[name]],
                "lr": step.lr,
                "betas": (step.beta1, step.beta2),
                "eps": step.eps,
                "weight_decay": step.weight_decay,
            }
        )
        saved[position] = {
            "step": torch.tensor(float(step.step - 1)),
            "exp_avg": entry.exp_avg.clone(),
            "exp_avg_sq": entry.exp_avg_sq.clone(),
        }
    optimizer = torch.optim.AdamW(groups, foreach=False)
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def optimised_naive_loop(
    model: nn.Module,
    state: AdamWState,
    candidates: Sequence[Example],
    references: ReferenceSets,
    *,
    max_grad_norm: float | None = None,
) -> np.ndarray:
    """Influence float64 [N, K]: the loop a careful engineer writes.

    Weights and optimizer state are put back from memory; the reference runs in large batches of similar
    length. Dropout is off. The model is left as it was.
    """
    optimizer = make_adamw(model, state)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluation_mode(model), gradients_aside(parameters):
        return _loop(model, optimizer, parameters, candidates, references, max_grad_norm)


def _loop(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    parameters: Sequence[nn.Parameter],
    candidates: Sequence[Example],
    references: ReferenceSets,
    max_grad_norm: float | None,
) -> np.ndarray:
    weights = [parameter.detach().clone() for parameter in parameters]
    moments = copy.deepcopy(optimizer.state_dict())
    before = references.loss(model, response_loss)
    influence = []
    for example in candidates:
        _train_step(model, optimizer, example, max_grad_norm)
        influence.append((before - references.loss(model, response_loss)).numpy())
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        # The optimizer takes the tensors themselves and steps on them in place.
        optimizer.load_state_dict(copy.deepcopy(moments))
    return np.array(influence)


def published_naive_loop(
    checkpoint: str | os.PathLike[str],
    candidates: Sequence[Example],
    references: Sequence[Example],
    *,
    max_length: int = 1024,
    reference_batch_size: int = 8,
) -> np.ndarray:
    """Influence float64 [N] as scripts of published methods compute it.

    The checkpoint's weights and optimizer state are read from disk for every candidate, every sequence is
    padded to `max_length`, and the reference runs in batches of `reference_batch_size`.
    """
    before = _padded_loss(load_model(checkpoint)[0], references, max_length, reference_batch_size)
    influence = []
    for example in candidates:
        model, _ = load_model(checkpoint)
        optimizer = make_adamw(model, read_state(checkpoint, model))
        _train_step(model, optimizer, _padded(example, max_length), max_grad_norm=None)
        influence.append(before - _padded_loss(model, references, max_length, reference_batch_size))
    return np.array(influence)


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    example: Example,
    max_grad_norm: float | None,
) -> None:
    optimizer.zero_grad()
    response_loss(model, collate([example])).sum().backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _padded_loss(model: nn.Module, examples: Sequence[Example], max_length: int, batch_size: int) -> float:
    losses = [
        response_loss(model, collate([_padded(example, max_length) for example in examples[i : i + batch_size]]))
        for i in range(0, len(examples), batch_size)
    ]
    return float(torch.cat(losses).mean())


def _padded(example: Example, max_length: int) -> Example:
    missing = max_length - example.num_tokens
    if missing < 0:
        raise ArgumentError(f"row {example.index}: {example.num_tokens} tokens, more than max_length={max_length}")
    return Example(
        input_ids=F.pad(example.input_ids, (0, missing)),
        labels=F.pad(example.labels, (0, missing), value=IGNORE_INDEX),
        index=example.index,
    )
