"""Frozen weights of 4 or 8 bits below adapters that are trained (QLoRA): layers of bitsandbytes, tensors of torchao."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from montessori.errors import ModelError

_WIDE = (torch.float32, torch.float64)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """By name. Known without importing the library: whoever has such a layer has imported it."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            yield name, module


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor itself; of one that wraps others, such as torchao's quantised weights, these."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_tensors(getattr(tensor, name))]


def compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """What 4-bit layers multiply in, whatever dtype they are given."""
    dtypes = (getattr(module, "compute_dtype", None) for _, module in quantised_layers(model))
    return {dtype for dtype in dtypes if dtype is not None}


def multiplies_narrow(model: nn.Module) -> bool:
    return not compute_dtypes(model) <= {*_WIDE}


def multiply_in_float32(model: nn.Module) -> None:
    """Make 4-bit layers of a copy multiply in float32: the loss of a narrow product does not show a small step."""
    for _, module in quantised_layers(model):
        if getattr(module, "compute_dtype", None) not in (None, *_WIDE):
            module.compute_dtype = torch.float32  # type: ignore[assignment]


def check_trainable_form(model: nn.Module) -> None:
    """Raise ModelError for 4-bit weights that were rewritten for inference on a processor.

    The first pass in eval mode does so, and their products then have no derivative, in training either.
    """
    for name, module in quantised_layers(model):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: its 4-bit weight is packed for inference, which has no derivative: load the model again, and "
                "call model.train() before its first pass"
            )
