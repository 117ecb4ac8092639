"""Products and look-ups that a module computes with its own weight, watched where they happen.

A hook on a module sees its inputs and outputs; what lies between them is its own affair. These modes are active
during one module's forward and report the call of torch in which the weight is used, so that a module which shifts
its ids, scales its result or returns more than one tensor is captured exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__)
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double)


class _Calls(TorchFunctionMode):
    """Active between `start` and `stop`, while gradients are recorded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module: Any = module
        self._active = False

    def start(self) -> None:
        self._active = torch.is_grad_enabled()
        if self._active:
            self.__enter__()

    def stop(self) -> None:
        if self._active:
            self._active = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.seen(func, args, kwargs, func(*args, **kwargs))

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raise NotImplementedError


class EmbeddingCalls(_Calls):
    """Look-ups in `module.weight`: `called(ids, padding_idx, output)` gives the output to go on with."""

    def __init__(self, module: nn.Module, called: Callable[[Tensor, int | None, Tensor], Tensor]) -> None:
        super().__init__(module)
        self._called = called

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if func is F.embedding and args[1] is self._module.weight:
            # The call's own padding_idx counts, which a subclass need not take from the module.
            return self._called(args[0], kwargs.get("padding_idx"), output)
        return output


class ProductCalls(_Calls):
    """Products x Wᵀ and sums + b with the module's weight [O, I] and bias [O], or with casts of them.

    `called(attributes, x, output)` gives the output to go on with; x is None for a sum.
    """

    def __init__(self, module: nn.Module, called: Callable[[tuple[str, ...], Tensor | None, Tensor], Tensor]) -> None:
        super().__init__(module)
        self._called = called
        # Each parameter of the module, with casts of it as they come.
        self._casts: dict[str, list[Tensor]] = {}

    def start(self) -> None:
        self._casts = {name: [parameter] for name, parameter in self._module.named_parameters(recurse=False)}
        super().start()

    def stop(self) -> None:
        super().stop()
        self._casts = {}

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if func in _CASTS:
            for casts in self._casts.values():
                if _among(args[0], casts) and isinstance(output, Tensor):
                    casts.append(output)
        elif func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            used = tuple(name for name in ("weight", "bias") if self._is(name, given.get(name)))
            if "weight" in used:
                return self._called(used, given["input"], output)
        elif func in _PRODUCTS and len(args) == 2 and self._is_transposed_weight(args[1]):
            return self._called(("weight",), args[0], output)
        elif func in _SUMS and len(args) == 2 and not kwargs and self._is("bias", args[1]):
            return self._called(("bias",), None, output)
        return output

    def _is(self, name: str, tensor: Any) -> bool:
        return _among(tensor, self._casts.get(name, []))

    def _is_transposed_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and any(
            tensor.data_ptr() == weight.data_ptr()
            and tensor.shape == weight.shape[::-1]
            and tensor.stride() == weight.stride()[::-1]
            for weight in self._casts.get("weight", [])
        )


def _among(tensor: Any, tensors: list[Tensor]) -> bool:
    return any(tensor is one for one in tensors)
