"""Parameters that the loss of text does not depend on: the image tower of a model that is trained on text alone.

A step of the optimizer passes over what has no gradient, so they have no moments, and are held fixed here as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from montessori.batching import Example, collate
from montessori.checkpoints import read_optimizer
from montessori.coverage import missing_inputs_named
from montessori.errors import IdleWarning, StateError
from montessori.live import borrowed, own_precision, undisturbed
from montessori.losses import LossFunction
from montessori.optim_state import AdamWState
from montessori.optimizers import LiveOptimizer
from montessori.parameters import trainable_parameters
from montessori.passes import HELD_FIXED, evaluation_mode, example_losses
from montessori.strangers import leaves_below


@dataclass(frozen=True)
class Idle:
    """Trainable `parameters` by name, and the modules that hold some of them and took no part in the forward pass.

    A silent module that is called makes every pass fail, one without gradients too; of other uses a pass with gradients
    tells (`montessori.passes.HELD_FIXED`).
    """

    parameters: Mapping[str, nn.Parameter]
    silent: Mapping[str, nn.Module]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Frozen inside; StateError is raised where a row takes one of them after all."""
        with ExitStack() as stack:
            stack.callback(HELD_FIXED.reset, HELD_FIXED.set(frozenset(self.parameters)))
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            for name, module in self.silent.items():
                stack.callback(module.register_forward_pre_hook(_refuse(name)).remove)
            yield


NOTHING = Idle({}, {})


def read_active(
    optimizer: LiveOptimizer | AdamWState | str | os.PathLike[str],
    model: nn.Module,
    lr: float | None,
    find: Callable[[], Idle],
) -> tuple[AdamWState, Idle]:
    """The state of the parameters that text reaches, as `read_optimizer` gives it, and the idle rest.

    `find` is asked only where there is no state of all trainable parameters. Raises StateError where there is none of
    those that text reaches either.
    """
    try:
        return read_optimizer(optimizer, model, lr), NOTHING
    except StateError:
        idle = find()
        if not idle.parameters:
            raise
    with idle.held():
        state = read_optimizer(optimizer, model, lr, idle.parameters)
    warnings.warn(
        f"{', '.join(_modules_of(idle, model))}: {len(idle.parameters)} trainable parameter(s) without moments in the "
        "optimizer, which get no gradient from text: held fixed, as its step does",
        IdleWarning,
        stacklevel=4,
    )
    return state, idle


@missing_inputs_named()
def find_idle(model: nn.Module, example: Example, loss: LossFunction) -> Idle:
    """What is trainable and does not enter the loss of `example`."""
    called: set[nn.Module] = set()
    with borrowed(model), own_precision(model), evaluation_mode(model), ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda module, _: called.add(module)).remove)
        device = next(model.parameters()).device
        with undisturbed(trainable_parameters(model)):
            losses = example_losses(model, collate([example]).to(device), loss)
            reached = {id(leaf) for leaf in leaves_below(losses)}
    idle = {name: entry for name, entry in trainable_parameters(model).items() if id(entry) not in reached}
    kept = {id(entry) for entry in idle.values()}
    silent = {
        name: module
        for name, module in model.named_modules()
        if module not in called and any(id(entry) in kept for entry in module.parameters(recurse=False))
    }
    return Idle(idle, silent)


def _modules_of(idle: Idle, model: nn.Module) -> Sequence[str]:
    """The outermost modules of which no trainable parameter is active; of what is in none, the parameter."""
    active = [name for name in trainable_parameters(model) if name not in idle.parameters]
    named: dict[str, None] = {}
    for name in idle.parameters:
        parts = name.split(".")
        outer = (".".join(parts[: i + 1]) for i in range(len(parts)))
        named[next(one for one in outer if one == name or not any(a.startswith(f"{one}.") for a in active))] = None
    shown = list(named)
    return shown if len(shown) <= 4 else [*shown[:3], f"{len(shown) - 3} more"]


def _refuse(name: str) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, _args: Any) -> None:
        raise StateError(
            f"{name} takes part in a row, though not in others, and the optimizer has no moments of its parameters: "
            "expected an optimizer that has stepped them; train them first, or freeze them"
        )

    return hook
