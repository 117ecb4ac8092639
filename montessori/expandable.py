"""Whether the reference loss changes as autograd's gradient says, which Eq. 3 and 4 rest on and real steps do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from montessori.errors import ModelError
from montessori.products import forward_replaced


def check_memory(model: nn.Module) -> None:
    """Raise ModelError where a trained parameter shares memory with another one: autograd gives each its own part of
    the derivative, and a step moves the memory of both."""
    for one, other in _sharing(dict(model.named_parameters())):
        raise ModelError(
            f"{one} and {other} are two parameters in the same memory: expected one parameter, or two; tie the modules "
            "(module.weight = other.weight), copy one of them, or use method='exact' with float32 weights"
        )


@contextmanager
def whole_derivative(model: nn.Module) -> Iterator[None]:
    """Inside, autograd also differentiates what a module takes for a constant though a step moves it: the norm of
    DoRA's weight, and an embedding's row for padding, which a tied head moves and which often ends every turn.

    For the gradient of the reference loss. That of a candidate keeps the constants, as the training step does.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                stack.callback(setattr, module, "padding_idx", module.padding_idx)
                module.padding_idx = None
        for layer in [layer for module in model.modules() for layer in _dora_layers(module)]:
            stack.enter_context(forward_replaced(layer, _nothing_constant(layer.forward)))
        yield


def _dora_layers(module: nn.Module) -> Iterator[nn.Module]:
    layers = getattr(module, "lora_magnitude_vector", None)
    if isinstance(layers, nn.ModuleDict):
        yield from layers.values()


class _NothingConstant(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def _nothing_constant(forward: Callable[..., Any]) -> Callable[..., Any]:
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        with _NothingConstant():
            return forward(*args, **kwargs)

    return differentiated


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
