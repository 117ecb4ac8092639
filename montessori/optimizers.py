"""Live optimizers: which are known, and whether their step is that of Eq. 1 and nothing else."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from montessori import quantised
from montessori.errors import ArgumentError, StateError
from montessori.parameters import versions

# Their type itself: a subclass may step differently.
_KNOWN = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
LiveOptimizer = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]

_PRE, _POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"


@dataclass(frozen=True)
class LiveState:
    """Of one parameter: its param group, its entry in `optimizer.state`, and whether weight decay is AdamW's."""

    group: Mapping[str, Any]
    entry: Mapping[str, Any]
    decoupled: bool


def live_states(optimizer: object) -> dict[int, LiveState]:
    """By the `id` of the parameter, of an optimizer or of several in a list, each with parameters of its own.

    Raises StateError for a kind whose step is not that of Eq. 1, and for hooks that run before its step.
    """
    found: dict[int, LiveState] = {}
    for part in _parts(optimizer):
        _check_known(part)
        _check_step(part)
        try:
            groups = quantised.groups_by_parameter(part)
        except ArgumentError as error:
            raise StateError(f"optimizer: {error}") from error
        if found.keys() & groups.keys():
            raise StateError("optimizer: expected several with parameters of their own, got one parameter in two")
        known = quantised.package_of(part) is not None
        decoupled = quantised.is_decoupled(part) if known else isinstance(part, torch.optim.AdamW)
        entries = {id(parameter): entry for parameter, entry in part.state.items()}
        found |= {key: LiveState(group, entries.get(key, {}), decoupled) for key, group in groups.items()}
    return found


def moments_of(optimizer: object) -> list[Any]:
    """What live optimizers keep in their state, in order."""
    return [value for part in _live(optimizer) for entry in part.state.values() for value in entry.values()]


class Reading:
    """A state as it was read from live optimizers: `tensors` are theirs, which a later step writes, or copies.

    Holds no optimizer: those that are gone write nothing any more.
    """

    def __init__(self, optimizer: object = (), tensors: Iterable[Tensor] = ()) -> None:
        self._tensors = list(tensors)
        self._then = versions(self._tensors)
        self._parts = [(weakref.ref(part), versions(moments_of(part))) for part in _live(optimizer)]

    def is_current(self) -> bool:
        """Whether neither the tensors nor what the optimizers keep were written or replaced since."""
        alive = ((part, then) for reference, then in self._parts if (part := reference()) is not None)
        as_they_were = versions(self._tensors) == self._then
        return as_they_were and all(versions(moments_of(part)) == then for part, then in alive)

    def __reduce__(self) -> tuple[type[Reading], tuple[()]]:
        # A deep copy, or what was pickled, has tensors of its own.
        return Reading, ()


def trained_by(optimizer: object) -> set[int]:
    """Ids of the parameters that live optimizers step."""
    groups = (group for part in _live(optimizer) for group in part.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def check_once(optimizer: object, parameters: Mapping[str, Tensor]) -> None:
    """Raise StateError where one of the named `parameters` stands more than once in the groups of live optimizers."""
    groups = (group for part in _live(optimizer) for group in part.param_groups)
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    twice = next((name for name, parameter in parameters.items() if counts[id(parameter)] > 1), None)
    if twice is not None:
        raise StateError(
            f"optimizer: expected {twice} once in its groups, got it {counts[id(parameters[twice])]} times, as where a "
            "shared weight is given by each of its names: torch steps it as often; build the optimizer from "
            "model.parameters()"
        )


def settings_of(optimizer: object) -> str:
    """What else of live optimizers may change between two calls, as a text: settings, grouping, hooks, also those of
    all optimizers."""
    parts = _live(optimizer)
    hooks = [_hooks(part) for part in parts]
    settings = [[_settings(group) for group in part.param_groups] for part in parts]
    return repr((settings, hooks, [id(vars(part).get("step")) for part in parts]))


def _live(optimizer: object) -> list[Any]:
    return [part for part in _parts(optimizer) if hasattr(part, "param_groups")]


def _settings(group: Mapping[str, Any]) -> list[Any]:
    held = [id(parameter) for parameter in group["params"]]
    return [held, *((key, _plain(value)) for key, value in group.items() if key != "params")]


def _plain(value: Any) -> Any:
    # A learning rate may be a tensor, of which torch shows four digits.
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _parts(optimizer: object) -> Sequence[Any]:
    # Whoever has wrapped an optimizer has imported it.
    accelerate = sys.modules.get("accelerate.optimizer")
    parts = []
    for part in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        while accelerate is not None and isinstance(part, accelerate.AcceleratedOptimizer):
            part = part.optimizer
        parts.append(part)
    return parts


def _check_known(part: Any) -> None:
    if type(part) in _KNOWN or quantised.package_of(part) is not None:
        return
    kind = type(part).__name__
    if not isinstance(part, torch.optim.Optimizer) and isinstance(
        getattr(part, "optimizer", None), torch.optim.Optimizer
    ):
        raise StateError(f"optimizer: expected an optimizer, got a {kind}: pass its .optimizer")
    raise StateError(
        f"unknown optimizer {kind}: supported are torch.optim.AdamW, Adam and SGD, and Adam and AdamW of bitsandbytes "
        "and torchao, one or a list of them; a step of another kind cannot be scored"
    )


def _hooks(part: Any) -> tuple[list[int], list[int]]:
    """Ids of the hooks before and after its step: its own and those of all optimizers."""
    # torch.optim takes the name of this module of its own away.
    everywhere = sys.modules["torch.optim.optimizer"]
    before = [*getattr(part, _PRE, ()), *getattr(everywhere, "_global_optimizer_pre_hooks", ())]
    return before, [*getattr(part, _POST, ()), *getattr(everywhere, "_global_optimizer_post_hooks", ())]


def _check_step(part: Any) -> None:
    """Refuse what may change gradients before the step; warn of what may change weights after it."""
    before, after = _hooks(part)
    if before:
        raise StateError(
            "optimizer: expected no hooks that run before its step (register_step_pre_hook), which may change the "
            "gradients: take them off, or build AdamWState yourself"
        )
    own = vars(part).get("step")
    what = None
    if after:
        what = "hooks run after its step (register_step_post_hook)"
    # Schedulers and torch.compile wrap it, and say what.
    elif own is not None and _innermost(own) is not _innermost(type(part).step):
        what = "its step has been replaced on the object"
    if what is not None:
        warnings.warn(
            f"optimizer: {what}; scores are of the step of torch.optim.{type(part).__name__} alone, without what these "
            "do to the weights",
            UserWarning,
            stacklevel=2,
        )


def _innermost(function: Any) -> Any:
    return inspect.unwrap(getattr(function, "__func__", function))
