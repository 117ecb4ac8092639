"""A float32 copy of a narrow model that computes with its own weights, whoever has wrapped its forward pass."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from montessori.batching import Example, collate
from montessori.errors import ModelError
from montessori.expandable import check_memory
from montessori.live import tensors_in
from montessori.losses import LossFunction
from montessori.parameters import trainable_parameters
from montessori.passes import evaluation_mode, example_losses, gradients_aside
from montessori.quantised_layers import multiplies_narrow, multiply_in_float32
from montessori.strangers import strangers_aside
from montessori.wording import first_line

_INSTEAD = (
    "pass the model without the wrapper, in float32, or method='first_order' with reference_dtype='model'; a loss "
    "function calls the model that it is given, not one that it holds"
)


def full_precision(model: nn.Module) -> nn.Module:
    """The model itself in float32 or float64, else a float32 copy.

    A step of 5e-6 on bfloat16 weights is mostly rounding, so everything about the reference loss is
    computed on float32 weights; quantised weights stay as they are and multiply in float32. What hooks of parameters
    do to a gradient they do to the copy's, which deepcopy would leave without them.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if dtypes <= {torch.float32, torch.float64} and not multiplies_narrow(model):
        return model
    check_memory(model)
    # torch copies no tensor that a graph has made: states that a module keeps from its last forward pass.
    kept = (value for module in model.modules() for value in tensors_in(vars(module)))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if "forward" in vars(module):
            module.forward = _rebound(vars(module)["forward"], memo)  # type: ignore[method-assign]
    copied.float()
    multiply_in_float32(copied)
    for parameter in trainable_parameters(model).values():
        for hook in (parameter._backward_hooks or {}).values():
            memo[id(parameter)].register_hook(partial(_of_one_dtype, _rebound(hook, memo)))
    return copied


def _of_one_dtype(hook: Callable[[Tensor], Tensor | None], grad: Tensor) -> Tensor | None:
    """`hook` on a float32 gradient; one that was written for a narrow parameter may return a narrow gradient."""
    changed = hook(grad)
    return None if changed is None else changed.to(grad.dtype)


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with what `memo` has a copy of in the place of the original. deepcopy leaves functions as they are, and
    a wrapped forward (TRL, accelerate) holds the module that it wraps in its closure."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, memo), _rebound(value.__self__, memo))
    if isinstance(value, partial):
        keywords = {name: _rebound(one, memo) for name, one in value.keywords.items()}
        bound = partial(_rebound(value.func, memo), *(_rebound(one, memo) for one in value.args), **keywords)
        vars(bound).update(vars(value))
        return bound
    return _rebound_function(value, memo) if isinstance(value, types.FunctionType) else value


def _rebound_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    known = function.__globals__
    # Functions it calls by name are whole programs; a model or its old forward may stand there too, in a script.
    named = {name: known[name] for name in function.__code__.co_names if name in known}
    moved = {
        name: _rebound(value, memo)
        for name, value in named.items()
        if isinstance(value, nn.Module | types.MethodType | partial)
    }
    if not function.__closure__ and all(moved[name] is named[name] for name in moved):
        return function
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(function.__code__, known | moved, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(vars(function))
    # Before its cells are filled: a function may hold itself.
    memo[id(function)] = made
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        try:
            cell.cell_contents = _rebound(original.cell_contents, memo)
        except ValueError:
            # An empty cell stays empty.
            continue
    return made


def check_copy(model: nn.Module, copied: nn.Module, example: Example, loss: LossFunction) -> None:
    """Raise ModelError unless the loss of `example` by `copied` comes from its own parameters and none of `model`'s.

    Its gradients would be 0, and so would every score.
    """
    own, foreign = list(copied.parameters()), list(model.parameters())
    batch = collate([example]).to(own[0].device)
    with evaluation_mode(copied), gradients_aside([*own, *foreign]), strangers_aside(()):
        try:
            example_losses(copied, batch, loss).sum().backward()
        except (RuntimeError, ModelError) as error:
            cause = error.__cause__ if isinstance(error, ModelError) else error
            if not isinstance(cause, RuntimeError):
                raise
            why = first_line(cause)
            raise ModelError(f"a float32 copy of the model does not compute ({why}): {_INSTEAD}") from error
        if any(one.grad is not None for one in foreign) or all(one.grad is None for one in own):
            raise ModelError(f"a forward of the model is wrapped, and a copy computes with its weights: {_INSTEAD}")
