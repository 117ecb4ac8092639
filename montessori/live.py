"""A model and an optimizer as their owner holds them: inside contexts of mixed precision, and trained between calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from montessori.optim_state import AdamWState


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Gradients on and autocast off, that which accelerate has built into the model's forward included.

    A step of 5e-6 is lost in bfloat16: everything is computed in the dtype of the weights.
    """
    device = next(model.parameters()).device.type
    attributes = vars(model)
    forward = attributes.get("forward")
    aside = forward is not None and "_original_forward" in attributes
    if aside:
        attributes["forward"] = attributes["_original_forward"]
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        if aside:
            attributes["forward"] = forward


def fixed_parts(model: nn.Module) -> tuple[Any, ...]:
    """What a proof of the capture rests on: the parameters and which of them are trained."""
    return tuple((name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters())


def moving_parts(model: nn.Module, optimizer: Any) -> tuple[Any, ...]:
    """Something that differs after any change in place of weights, moments or hyperparameters; no value is read.

    `optimizer`: a live one, an AdamWState, or the path of a checkpoint, which does not move.
    """
    if isinstance(optimizer, AdamWState):
        moments = [tensor for state in optimizer.values() for _, tensor in state.tensors()]
        return _versions([*model.parameters(), *moments]), ()
    groups = getattr(optimizer, "param_groups", [])
    moments = [value for entry in getattr(optimizer, "state", {}).values() for value in entry.values()]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return _versions([*model.parameters(), *moments]), tuple(map(repr, settings))


def _versions(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(_version(value) if isinstance(value, Tensor) else value for value in values)


def _version(tensor: Tensor) -> tuple[int, int]:
    # A tensor of a class of its own (quantised) may have no address.
    plain = type(tensor) in (Tensor, nn.Parameter)
    return (tensor.data_ptr() if plain else id(tensor)), (0 if tensor.is_inference() else tensor._version)
