"""A model and an optimizer as their owner holds them: inside contexts of mixed precision, and trained between calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from montessori.optim_state import AdamWState


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Gradients on and autocast off, that which accelerate has built into the model's forward included.

    A step of 5e-6 is lost in bfloat16: everything is computed in the dtype of the weights. What torch.compile made runs
    as it was written: hooks and products of our own are not for its compiler.
    """
    device = next(model.parameters()).device.type
    attributes = vars(model)
    forward = attributes.get("forward")
    aside = forward is not None and "_original_forward" in attributes
    if aside:
        attributes["forward"] = attributes["_original_forward"]
    try:
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False), eager:
            yield
    finally:
        if aside:
            attributes["forward"] = forward


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and the wrappers of data parallelism, whose backward pass would average the
    gradients of different candidates."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class Watch:
    """Notices what the owner of a model and its optimizer changes between two calls.

    `optimizer`: a live one, an AdamWState, or the path of a checkpoint, which does not move.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer
        self.accept()

    def changes(self) -> tuple[bool, bool]:
        """Whether parameters were exchanged, frozen or freed, and whether a value or a setting is another."""
        moved = self._versions != self._now() or self._sums != self._bits()
        return self._fixed != _fixed_parts(self._model), moved

    def accept(self) -> None:
        """What is there now is what later changes are seen against."""
        self._fixed, self._sums = _fixed_parts(self._model), self._bits()
        self.settle()

    def settle(self) -> None:
        """Values are as they were, though they have been written: steps taken and taken back."""
        self._versions = self._now()

    def _moments(self) -> list[Any]:
        if isinstance(self._optimizer, AdamWState):
            return [tensor for state in self._optimizer.values() for _, tensor in state.tensors()]
        return [value for entry in getattr(self._optimizer, "state", {}).values() for value in entry.values()]

    def _now(self) -> tuple[Any, ...]:
        groups = getattr(self._optimizer, "param_groups", [])
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        values = [*self._model.parameters(), *self._moments()]
        return tuple(_version(value) if isinstance(value, Tensor) else value for value in values), repr(settings)

    def _bits(self) -> tuple[int, ...]:
        """Sums of the bits of all tensors: a write past torch (`.data`, numpy) leaves the versions as they are."""
        tensors = [*self._model.parameters(), *self._model.buffers(), *self._moments()]
        sums: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if _is_plain(tensor) and tensor.numel() and tensor.layout is torch.strided:
                sums.setdefault(tensor.device, []).append(_bit_sum(tensor.detach()))
        return tuple(total for group in sums.values() for total in torch.stack(group).tolist())


def _fixed_parts(model: nn.Module) -> tuple[Any, ...]:
    """What a proof of the capture rests on: the parameters and which of them are trained."""
    return tuple((name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters())


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter)


def _version(tensor: Tensor) -> tuple[int, int]:
    # A tensor of a class of its own (quantised) may have no address.
    address = tensor.data_ptr() if _is_plain(tensor) else id(tensor)
    return address, (0 if tensor.is_inference() else tensor._version)


def _bit_sum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1)
    size = flat.numel() * flat.element_size()
    width = next(width for width in (8, 4, 2, 1) if size % width == 0)
    # A slice, or memory of somebody else's, may start where no wider number can.
    if flat.data_ptr() % width or flat.storage_offset() * flat.element_size() % width:
        flat = flat.clone()
    return flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width]).sum()
