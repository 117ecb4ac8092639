"""Whether the reference loss changes as autograd's gradient says, which Eq. 3 and 4 rest on and real steps do not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from montessori.errors import CurvatureWarning, ModelError


def check_memory(model: nn.Module) -> None:
    """Raise ModelError where a trained parameter shares memory with another one: autograd gives each its own part of
    the derivative, and a step moves the memory of both."""
    for one, other in _sharing(dict(model.named_parameters())):
        raise ModelError(
            f"{one} and {other} are two parameters in the same memory: expected one parameter, or two; tie the modules "
            "(module.weight = other.weight), copy one of them, or use method='exact' with float32 weights"
        )


def check_expandable(model: nn.Module) -> None:
    """`check_memory`, and a warning where a module hides a part of the derivative from autograd (DoRA)."""
    check_memory(model)
    constant = next((name for name, module in model.named_modules() if _has_dora(module)), None)
    if constant is not None:
        warnings.warn(
            f"{constant}: DoRA holds the norm of its weight constant for autograd, so no gradient is that of the loss; "
            "influences may be some 10 % off at any learning rate: compare with `audit`, or use method='exact'",
            CurvatureWarning,
            stacklevel=3,
        )


def _has_dora(module: nn.Module) -> bool:
    used = getattr(module, "use_dora", None)
    active = getattr(module, "active_adapters", ())
    return isinstance(used, Mapping) and any(used.get(name) for name in active)


def _sharing(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str]]:
    """Pairs of names of which one is trained and whose values lie in the same memory, in part at least."""
    # What is not strided, or of a class of its own, has no address.
    placed = sorted(
        (parameter.data_ptr(), name, parameter)
        for name, parameter in parameters.items()
        if parameter.layout is torch.strided and type(parameter) is nn.Parameter and parameter.numel()
    )
    open_ones: list[tuple[str, nn.Parameter]] = []
    for start, name, parameter in placed:
        open_ones = [(other, earlier) for other, earlier in open_ones if _end(earlier) > start]
        for other, earlier in open_ones:
            trained = earlier.requires_grad or parameter.requires_grad
            if trained and earlier.device == parameter.device and _overlap(earlier, parameter):
                yield other, name
        open_ones.append((name, parameter))


def _end(tensor: Tensor) -> int:
    """The address behind the last value of a tensor."""
    return tensor.data_ptr() + _extent(tensor) * tensor.element_size()


def _extent(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _overlap(earlier: Tensor, later: Tensor) -> bool:
    """Whether two tensors in one stretch of memory have a value in common; columns of one matrix have none."""
    distance, uneven = divmod(later.data_ptr() - earlier.data_ptr(), earlier.element_size())
    if uneven or earlier.dtype != later.dtype:
        return True
    memory = torch.zeros(max(_extent(earlier), distance + _extent(later)), dtype=torch.bool)
    memory.as_strided(earlier.shape, earlier.stride(), 0).fill_(True)
    return bool(memory.as_strided(later.shape, later.stride(), distance).any())
