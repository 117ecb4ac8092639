"""The optimizer state of every trainable parameter, by name: moments and hyperparameters of Eq. 1."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from montessori import quantised
from montessori.errors import ArgumentError, StateError
from montessori.optimizers import Reading, check_once, live_states
from montessori.parameters import trainable_parameters
from montessori.steps import AdamWStep, OptimizerStep, SGDStep
from montessori.wording import one_line
from montessori.writing import written_whole

TENSOR_FILE = "adamw_state.safetensors"
JSON_FILE = "adamw_state.json"

_FORMAT = "montessori adamw_state 1"
# Names in an error.
_SHOWN = 3
_ADAM_OPTIONS = frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"})
_SGD_OPTIONS = frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"})
_UNSUPPORTED_OPTIONS = ("amsgrad", "maximize", "differentiable")
_ADAM_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})
_SGD_STATE = frozenset({"momentum_buffer"})


@dataclass(frozen=True, eq=False)
class ParameterState:
    """State of one parameter: the step about to be taken and the moments before it.

    `exp_avg` and `exp_avg_sq` have the shape of the parameter. With `SGDStep`, `exp_avg` is the
    momentum buffer (None without momentum, or when there is no buffer yet) and `exp_avg_sq` is None.
    """

    step: OptimizerStep
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`("exp_avg", tensor)` and `("exp_avg_sq", tensor)`, those that are present."""
        for label in ("exp_avg", "exp_avg_sq"):
            tensor = getattr(self, label)
            if tensor is not None:
                yield label, tensor


class AdamWState(Mapping[str, ParameterState]):
    """Ordered, read-only mapping from parameter name to `ParameterState`.

    Names are those of `model.named_parameters()`; a shared parameter stands once, under its first
    name. Build it with `from_optimizer`, `load`, `montessori.checkpoints.read_state`, or from a
    mapping of your own. Tensors are referenced, never copied; `copy.deepcopy` gives a state its own.
    """

    def __init__(self, states: Mapping[str, ParameterState]) -> None:
        if not isinstance(states, Mapping):
            raise ArgumentError(f"states: expected a mapping from parameter name to state, got {type(states).__name__}")
        for name, state in states.items():
            if not isinstance(name, str) or not isinstance(state, ParameterState):
                raise ArgumentError(
                    f"states[{name!r}]: expected a mapping from parameter name to ParameterState, "
                    f"got {type(name).__name__} to {type(state).__name__}"
                )
        self._states = dict(states)
        self._reading = Reading()

    def __getitem__(self, name: str) -> ParameterState:
        return self._states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        steps = sorted({state.step.step for state in self.values()})
        return f"AdamWState({len(self)} parameters, step {', '.join(map(str, steps)) or 'none'})"

    @classmethod
    def from_optimizer(cls, model: nn.Module, optimizer: object) -> AdamWState:
        """State of a live `torch.optim.AdamW`, `Adam` or `SGD`, of an Adam or AdamW of bitsandbytes or torchao, or of
        accelerate's wrapper around one, or of several of these in a list.

        Every trainable parameter of `model` gets the hyperparameters of its own param group;
        tensors are detached references, 8-bit moments float32 copies. Once the optimizer goes on, `check_current`
        refuses the state: read it again. A parameter that has not been stepped yet is taken in without tensors:
        `validate` names it.

        Raises StateError for another optimizer, for amsgrad, maximize or differentiable, and when
        the optimizer does not hold the trainable parameters of `model`. Warns of what runs after its step.
        """
        found = live_states(optimizer)
        trainable = trainable_parameters(model)
        check_once(optimizer, trainable)
        foreign = len(found.keys() - {id(parameter) for parameter in model.parameters()})
        # A head that the loss of text does not have (a value head) may be stepped beside the model.
        if foreign and any(id(parameter) not in found for parameter in trainable.values()):
            raise StateError(
                f"optimizer: {foreign} of its {len(found)} parameters are not in the model: "
                "pass the optimizer that was built for this model"
            )
        states = {
            name: parameter_state(live.group, live.entry, name, live.decoupled)
            for name, parameter in trainable.items()
            if (live := found.get(id(parameter))) is not None
        }
        state = cls(states)
        state.check_layout(model)
        state._reading = Reading(optimizer, (tensor for entry in states.values() for _, tensor in entry.tensors()))
        return state

    def check_current(self) -> None:
        """Raise StateError where the optimizer that it was read from has stepped since, or was given other moments:
        the tensors would be those of now, the step count, rates and whether there is a buffer those of then."""
        if not self._reading.is_current():
            raise StateError(
                f"{self!r}: its optimizer has written or replaced moments since it was read, expected them as they "
                "were: read it again (AdamWState.from_optimizer), or pass the optimizer itself, which is followed"
            )

    def check_layout(self, model: nn.Module) -> None:
        """Raise StateError unless the entries are the trainable parameters of `model`, shape by shape."""
        parameters = trainable_parameters(model)
        missing = [name for name in parameters if name not in self]
        if missing:
            raise StateError(
                f"optimizer state is missing for trainable {_listed(missing)}: expected one entry per "
                "parameter with requires_grad; pass the state of all, or freeze those that take no part"
            )
        extra = [name for name in self if name not in parameters]
        if extra:
            raise StateError(
                f"optimizer state has entries for {_listed(extra)}, not among the trainable parameters "
                "of the model: pass the state that belongs to this model"
            )
        for name, state in self.items():
            for label, tensor in state.tensors():
                if tensor.shape != parameters[name].shape:
                    raise StateError(
                        f"{label} of {name}: expected shape {list(parameters[name].shape)}, "
                        f"got {list(tensor.shape)}: optimizer state of another model"
                    )

    def validate(self, model: nn.Module) -> None:
        """Raise StateError unless a step of `model` can be computed from this state.

        Checks that it is current, names, shapes, that every parameter has been stepped, that moments are finite and
        `exp_avg_sq` is not negative, and that the learning rate is not 0 everywhere.
        """
        self.check_current()
        self.check_layout(model)
        unstepped = [name for name, state in self.items() if not _is_stepped(state)]
        if unstepped:
            raise StateError(
                f"optimizer state of {_listed(unstepped)} has no moments (step 0?): expected an "
                "optimizer that has stepped; train first, or freeze parameters that get no gradient"
            )
        for name, state in self.items():
            for label, tensor in state.tensors():
                _check_values(f"{label} of {name}", tensor, allow_negative=label == "exp_avg")
        if self and all(state.step.lr == 0 for state in self.values()):
            raise StateError("the learning rate is 0 in every group (a schedule that has decayed to 0?): pass lr=")

    def with_overrides(
        self,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
    ) -> AdamWState:
        """A new state with these hyperparameters in every group, None keeping what is there.

        Tensors are shared with this state. `weight_decay` also reaches the groups without decay.
        Raises ArgumentError for a value out of range, and for betas or eps of an SGD state.
        """
        if betas is not None and not (isinstance(betas, Sequence) and len(betas) == 2):
            raise ArgumentError(f"betas={betas!r}: expected two numbers")
        given = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        if betas is not None:
            given |= {"beta1": betas[0], "beta2": betas[1]}
        changes = {key: _number(key, value) for key, value in given.items() if value is not None}
        adam_only = sorted(changes.keys() & {"beta1", "beta2", "eps"})
        if adam_only and any(isinstance(state.step, SGDStep) for state in self.values()):
            raise ArgumentError(f"{', '.join(adam_only)}: the state is of SGD, which has only lr and weight_decay")
        replaced: dict[str, ParameterState] = {}
        for name, state in self.items():
            step = dataclasses.replace(state.step, **changes)  # type: ignore[arg-type]
            replaced[name] = dataclasses.replace(state, step=step)
        return self._with(replaced)

    def beside(self, model: nn.Module) -> AdamWState:
        """The same state with every tensor on the device of its parameter; shared where it is there."""
        parameters = trainable_parameters(model)
        moved = {}
        for name, state in self.items():
            device = parameters[name].device
            tensors = {label: tensor.to(device) for label, tensor in state.tensors()}
            moved[name] = ParameterState(state.step, tensors.get("exp_avg"), tensors.get("exp_avg_sq"))
        return self._with(moved)

    def _with(self, states: Mapping[str, ParameterState]) -> AdamWState:
        other = AdamWState(states)
        other._reading = self._reading
        return other

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of hyperparameters and tensors; the order of names does not matter."""
        content = hashlib.sha256()
        for name in sorted(self):
            state = self[name]
            content.update(json.dumps([name, _step_fields(state.step)], sort_keys=True).encode())
            for label, tensor in state.tensors():
                content.update(f"{label} {tensor.dtype} {list(tensor.shape)}".encode())
                content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return content.hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `adamw_state.safetensors` and `adamw_state.json` into `directory`, made if needed.

        A directory whose write was cut short has no `adamw_state.json`, and `load` refuses it. Raises StateError as
        `check_current` does.
        """
        self.check_current()
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / JSON_FILE).unlink(missing_ok=True)
        save_file(_unshared(self), path / TENSOR_FILE)
        steps: dict[OptimizerStep, int] = {}
        for state in self.values():
            steps.setdefault(state.step, len(steps))
        record = {
            "format": _FORMAT,
            "groups": [_step_fields(step) for step in steps],
            "parameters": {name: steps[state.step] for name, state in self.items()},
        }
        with written_whole(path / JSON_FILE) as partial:
            # In the order of the parameters.
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> AdamWState:
        """The state that `save` wrote into `directory`, tensors on the CPU.

        Raises StateError when a file is missing, unreadable or does not fit the other.
        """
        path = Path(directory)
        absent = [name for name in (JSON_FILE, TENSOR_FILE) if not (path / name).is_file()]
        if absent:
            raise StateError(f"{path}: expected {JSON_FILE} and {TENSOR_FILE}, {_listed(absent)} is missing")
        try:
            record = json.loads((path / JSON_FILE).read_text(encoding="utf-8"))
            steps = [_step_from_fields(fields) for fields in record["groups"]]
            if record["format"] != _FORMAT:
                raise ValueError(f"the format {record['format']!r}, expected {_FORMAT!r}")
            named_steps = {name: dict(enumerate(steps))[group] for name, group in record["parameters"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StateError(f"{path / JSON_FILE}: expected what save writes, got {error!r}") from error
        try:
            tensors = load_file(path / TENSOR_FILE)
        except (SafetensorError, OSError) as error:
            raise StateError(f"{path / TENSOR_FILE}: expected a safetensors file, got {one_line(error)}") from error
        states = {
            name: ParameterState(step, tensors.pop(f"exp_avg.{name}", None), tensors.pop(f"exp_avg_sq.{name}", None))
            for name, step in named_steps.items()
        }
        if tensors:
            raise StateError(f"{path}: {TENSOR_FILE} has {_listed(list(tensors))}, unknown to {JSON_FILE}")
        return cls(states)


def parameter_state(
    group: Mapping[str, object], entry: Mapping[str, object], name: str, decoupled: bool = True
) -> ParameterState:
    """State of the parameter `name` from its torch param group and its entry in `optimizer.state`.

    `decoupled` says AdamW (True) or Adam (False) for a group without `decoupled_weight_decay`.
    Raises StateError, naming the parameter, for options or state that no supported optimizer has.
    """
    try:
        group, entry = quantised.in_torch_layout(group, entry)
    except ArgumentError as error:
        raise StateError(f"optimizer state of {name}: {error}") from error
    is_adam, is_sgd = group.keys() >= _ADAM_OPTIONS, group.keys() >= _SGD_OPTIONS
    foreign = sorted(str(key) for key in entry.keys() - (_SGD_STATE if is_sgd else _ADAM_STATE))
    if foreign and not group.get("amsgrad"):
        raise StateError(
            f"optimizer state of {name}: keys {', '.join(foreign)} are of another optimizer: expected "
            "step, exp_avg and exp_avg_sq (AdamW, Adam) or momentum_buffer (SGD)"
        )
    if not (is_adam or is_sgd):
        options = ", ".join(sorted(str(key) for key in group if key != "params"))
        raise StateError(
            f"param group of {name} has options {options}: expected those of torch.optim.AdamW, Adam or "
            "SGD; build AdamWState yourself for another optimizer"
        )
    for option in _UNSUPPORTED_OPTIONS:
        if group.get(option):
            raise StateError(f"param group of {name}: {option}={group[option]} is not supported")
    try:
        return _sgd_state(group, entry) if is_sgd else _adam_state(group, entry, decoupled)
    except (ArgumentError, TypeError, ValueError) as error:
        raise StateError(f"optimizer state of {name}: {error}") from error


def _adam_state(group: Mapping, entry: Mapping, decoupled: bool) -> ParameterState:
    if entry and entry.keys() != _ADAM_STATE:
        raise ArgumentError(f"expected step, exp_avg and exp_avg_sq, got {', '.join(sorted(entry))}")
    beta1, beta2 = group["betas"]
    step = AdamWStep(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        step=_step_count(entry.get("step", 0)) + 1,
        decoupled=bool(group.get("decoupled_weight_decay", decoupled)),
    )
    return ParameterState(step, _detached(entry, "exp_avg"), _detached(entry, "exp_avg_sq"))


def _sgd_state(group: Mapping, entry: Mapping) -> ParameterState:
    buffer = _detached(entry, "momentum_buffer")
    step = SGDStep(
        lr=float(group["lr"]),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
        step=1 if buffer is None else 2,
    )
    return ParameterState(step, buffer, None)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}={value!r}: expected a number") from None


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _detached(entry: Mapping[str, object], key: str) -> Tensor | None:
    tensor = entry.get(key)
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"expected {key} to be a tensor, got {type(tensor).__name__}")
    return tensor.detach()


def _step_count(value: float | Tensor) -> int:
    count = float(value)
    if not math.isfinite(count) or count < 0 or count != int(count):
        raise ArgumentError(f"expected step to be a whole number >= 0, got {count}")
    return int(count)


def _is_stepped(state: ParameterState) -> bool:
    if isinstance(state.step, SGDStep):
        return state.exp_avg is not None or state.step.momentum == 0 or state.step.step == 1
    return state.step.step > 1 and state.exp_avg is not None and state.exp_avg_sq is not None


def _check_values(where: str, tensor: Tensor, allow_negative: bool) -> None:
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise StateError(f"{where}: expected 16-bit floating point or wider, got {tensor.dtype}: dequantise the state")
    if tensor.numel() == 0:
        return
    lowest, highest = torch.aminmax(tensor)
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise StateError(f"{where}: expected finite values, got NaN or Inf: the training run has diverged")
    if lowest < 0 and not allow_negative:
        raise StateError(f"{where}: expected values >= 0, got {lowest.item():g}: not a second moment")


def _step_fields(step: OptimizerStep) -> dict[str, object]:
    return {"optimizer": type(step).__name__.removesuffix("Step"), **dataclasses.asdict(step)}


def _step_from_fields(fields: Mapping) -> OptimizerStep:
    options = {key: value for key, value in fields.items() if key != "optimizer"}
    return {"AdamW": AdamWStep, "SGD": SGDStep}[fields["optimizer"]](**options)


def _unshared(states: Mapping[str, ParameterState]) -> dict[str, Tensor]:
    """Contiguous tensors by file key; safetensors refuses two that share a storage, so one is copied."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, state in states.items():
        for label, tensor in state.tensors():
            flat = tensor.detach().contiguous()
            shared = flat.untyped_storage().data_ptr() in storages
            tensors[f"{label}.{name}"] = flat.clone() if shared else flat
            storages.add(flat.untyped_storage().data_ptr())
    return tensors
