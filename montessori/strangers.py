"""Parameters that a loss function of the user's own brings along: of a teacher, say, or of a head that it holds.

A backward pass gives them gradients, which belong to nobody here; where the optimizer trains them, a step moves them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from montessori.errors import ModelError


@dataclass
class _Aside:
    """Strangers met so far with the gradient that they had; `trained` are the ids of what the optimizer steps."""

    trained: Collection[int]
    kept: dict[int, tuple[nn.Parameter, Tensor | None]] = field(default_factory=dict)


_ASIDE: ContextVar[_Aside | None] = ContextVar("aside", default=None)


@contextmanager
def strangers_aside(trained: Collection[int]) -> Iterator[None]:
    """Inside, what `look_for_strangers` meets loses its gradient, to have it again outside."""
    aside = _Aside(trained)
    token = _ASIDE.set(aside)
    try:
        yield
    finally:
        _ASIDE.reset(token)
        for parameter, grad in aside.kept.values():
            parameter.grad = grad


def look_for_strangers(model: nn.Module, losses: Tensor) -> None:
    """Note the parameters below `losses` that are not the model's.

    Raises ModelError for one that the optimizer trains: its part of the step would be missing.
    """
    aside = _ASIDE.get()
    if aside is None:
        return
    own = {id(parameter) for parameter in model.parameters()}
    for leaf in leaves_below(losses):
        if not isinstance(leaf, nn.Parameter) or id(leaf) in own or id(leaf) in aside.kept:
            continue
        if id(leaf) in aside.trained:
            raise ModelError(
                f"the loss function uses a parameter {list(leaf.shape)} that the optimizer trains and the model does "
                "not have: its part of the step would be missing; make it a part of the model (a submodule)"
            )
        aside.kept[id(leaf)] = leaf, leaf.grad
        leaf.grad = None


def leaves_below(losses: Tensor) -> list[Tensor]:
    """The leaves that autograd would bring a gradient to."""
    waiting, seen, leaves = [losses.grad_fn], set(), []
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
