"""The parameters that count, and whether a tensor has been written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those with `requires_grad`, by name; one that is shared has its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_plain(value: object) -> bool:
    """Whether it is a tensor of torch's own, which has an address."""
    return type(value) in (Tensor, nn.Parameter)


def version(tensor: Tensor) -> tuple[int, int]:
    """Another one after every write by torch, and where the tensor has other memory."""
    # A tensor of a class of its own (quantised) may have no address.
    address = tensor.data_ptr() if is_plain(tensor) else id(tensor)
    return address, (0 if tensor.is_inference() else tensor._version)


def versions(values: Iterable[Any]) -> list[Any]:
    """Of the tensors among `values`; others are their own."""
    return [version(value) if isinstance(value, Tensor) else value for value in values]
