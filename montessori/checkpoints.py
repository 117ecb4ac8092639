"""Optimizer state from the directories that training programs leave behind.

Recognised by the files in the directory: this package's own format, a checkpoint of Hugging Face
Trainer or TRL (`optimizer.pt`), `accelerate.save_state` (`optimizer.bin`), FSDP's sharded states
(`optimizer_0/.metadata`, or the directory itself) and DeepSpeed's ZeRO (`*_optim_states.pt`).

A torch state dict counts parameters instead of naming them. The names are restored from the order in
which the optimizer was given the parameters, and every shape is checked. Two parameters of one shape
that the training program handed over in another order than the ones documented in `read_state`
cannot be told apart from the file: pass the live optimizer to `AdamWState.from_optimizer` then.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from montessori.errors import StateError
from montessori.optim_state import JSON_FILE, TENSOR_FILE, AdamWState, ParameterState, parameter_state
from montessori.optimizers import LiveOptimizer
from montessori.wording import first_line
from montessori.zero import read_zero, zero_directory

TRAINER_FILE = "optimizer.pt"
ACCELERATE_FILE = "optimizer.bin"
METADATA_FILE = ".metadata"
# Options of optimizers that are no AdamW, with the value that makes no difference: without correction of the first
# steps, cautious, LARS and LAMB, rectified, schedule-free, Muon beside AdamW, Prodigy.
_OF_OTHER_STEPS = {
    "bias_correction": True,
    "correct_bias": True,
    "caution": False,
    "cautious": False,
    "corrected_weight_decay": False,
    "trust_coeff": None,
    "trust_coefficient": None,
    "trust_clip": False,
    "rectify": False,
    "weight_sum": None,
    "use_muon": False,
    "d_coef": None,
}
_LIVE = "pass the live optimizer instead: AdamWState.from_optimizer(model, optimizer)"


def read_state(directory: str | os.PathLike[str], model: nn.Module, idle: Collection[str] = ()) -> AdamWState:
    """State of every trainable parameter of `model`, tensors on the CPU, from a checkpoint directory.

    The order of parameters in `optimizer.pt` and `optimizer.bin` is, in this order of preference:
    the names in the file (a state keyed by name, or `param_names` of an optimizer built from
    `named_parameters()`); one group as large as the trainable parameters, in the order of
    `model.parameters()`; two groups, the decayed parameters and the rest by Trainer's own rule.
    Only trainable parameters count, so for LoRA pass the model with its adapter; an optimizer that also holds those
    that are frozen now, all of them or those named in `idle`, is read as well.

    A file without `decoupled_weight_decay`, which does not tell Adam from AdamW, is read as AdamW.
    Files are read without unpickling objects.

    Raises StateError when the directory or its state does not fit; values are left to
    `AdamWState.validate`, so that a learning rate of 0 can still be overridden.
    """
    path = Path(directory).expanduser()
    if path.is_file():
        raise StateError(f"{path}: expected a checkpoint directory, got a file: give the directory that it lies in")
    if not path.is_dir():
        raise StateError(f"{path}: expected a checkpoint directory, none is there: check the path")
    if (path / JSON_FILE).exists() or (path / TENSOR_FILE).exists():
        state = AdamWState.load(path)
    else:
        state = _read_torch_state(path, model, idle)
    state.check_layout(model)
    return state


def read_optimizer(
    optimizer: LiveOptimizer | AdamWState | str | os.PathLike[str],
    model: nn.Module,
    lr: float | None,
    idle: Collection[str] = (),
) -> AdamWState:
    """State of any of these, checked and on the devices of the model's parameters; `lr` replaces the one found.

    `idle` as in `read_state`.
    """
    if isinstance(optimizer, str | os.PathLike):
        state = read_state(optimizer, model, idle)
    elif isinstance(optimizer, AdamWState):
        state = optimizer
    else:
        state = AdamWState.from_optimizer(model, optimizer)
    if lr is not None:
        state = state.with_overrides(lr=lr)
    state.validate(model)
    return state.beside(model)


def list_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run in `path`, as Trainer names them, in the order of their steps."""
    found = [entry for entry in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", entry.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _optimizers(path: Path, model: nn.Module) -> dict[str, Callable[[], dict]]:
    """How to read each optimizer that lies in `path`, by what it lies in."""
    found: dict[str, Callable[[], dict]] = {}
    for file in [path / TRAINER_FILE, path / ACCELERATE_FILE, *sorted(path.glob("optimizer_*.bin"))]:
        if file.is_file():
            found[file.name] = partial(_load, file)
    for folder in [path, *sorted(path.glob("optimizer_*"))]:
        if (folder / METADATA_FILE).is_file():
            found[f"{folder.name}/{METADATA_FILE}"] = partial(_read_distributed, folder)
    zero = zero_directory(path)
    if zero is not None:
        found[zero.name] = partial(read_zero, zero, _decayed_names(model).__contains__, dict(model.named_parameters()))
    return found


def _read_distributed(folder: Path) -> dict:
    # Imports torch's distributed checkpoints, which take longer than reading most of them.
    from montessori.sharded import read_distributed

    return read_distributed(folder / METADATA_FILE)


def _saved_optimizer(path: Path, model: nn.Module) -> tuple[str, dict]:
    """What the optimizer in `path` lies in, and its state dict."""
    found = _optimizers(path, model)
    if len(found) > 1:
        raise StateError(f"{path}: expected one optimizer, got {', '.join(found)}: {_LIVE}")
    if found:
        name, read = found.popitem()
        return name, read()
    checkpoints = [checkpoint.name for checkpoint in list_checkpoints(path)]
    if checkpoints:
        raise StateError(f"{path}: expected one checkpoint, got a run: name one of {', '.join(checkpoints)}")
    raise StateError(
        f"{path}: no optimizer state: expected {TRAINER_FILE} (Trainer, TRL), {ACCELERATE_FILE} "
        f"(accelerate.save_state), optimizer_0/{METADATA_FILE} (FSDP), *_optim_states.pt (DeepSpeed) or {JSON_FILE} "
        f"with {TENSOR_FILE}; save the optimizer with the model"
    )


def _read_torch_state(path: Path, model: nn.Module, idle: Collection[str]) -> AdamWState:
    file, saved = _saved_optimizer(path, model)
    groups, entries = saved["param_groups"], saved["state"]
    for group in groups:
        _check_options(path / file, group)
    names_by_group = _parameter_names(path / file, groups, model, idle)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    states: dict[str, ParameterState] = {}
    for group, names in zip(groups, names_by_group, strict=True):
        for key, name in zip(group["params"], names, strict=True):
            if name not in frozen:
                states[name] = parameter_state(group, entries.get(key, {}), name)
                _check_two_moments(path / file, name, states[name])
    order = [name for name, _ in model.named_parameters() if name in states]
    foreign = [name for name in states if name not in set(order)]
    return AdamWState({name: states[name] for name in order + foreign})


def _check_options(file: Path, group: Mapping) -> None:
    """Optimizers of others than torch save moments under the same names, and step from them in another way."""
    for option, plain in _OF_OTHER_STEPS.items():
        value = group.get(option, plain)
        if value != plain:
            raise StateError(
                f"{file}: param group has {option}={value}: expected the options of torch's AdamW, Adam or SGD; the "
                "step of another optimizer cannot be scored"
            )


def _check_two_moments(file: Path, name: str, state: ParameterState) -> None:
    first, second = state.exp_avg, state.exp_avg_sq
    if first is not None and second is not None and torch.equal(first, second) and second.any():
        raise StateError(
            f"{file}: exp_avg of {name} has the values of its exp_avg_sq, as FSDP1 writes a full state dict on CPU "
            "ranks: save sharded states, or use FSDP2"
        )


def _load(file: Path) -> dict:
    # A damaged file makes the reader raise almost anything.
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            raise StateError(
                f"{file}: expected tensors and plain values, got objects, which are not unpickled since that runs "
                "code: save the optimizer's state_dict() alone"
            ) from error
        raise StateError(f"{file}: cannot be read as plain tensors ({first_line(error)}): save it again") from error
    fits = (
        isinstance(saved, dict)
        and isinstance(saved.get("state"), Mapping)
        and all(isinstance(entry, Mapping) for entry in saved["state"].values())
        and isinstance(saved.get("param_groups"), Sequence)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in saved["param_groups"])
    )
    if not fits:
        got = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved).__name__
        raise StateError(f"{file}: expected a torch optimizer's state and param_groups, got {got}: {_LIVE}")
    return saved


def _parameter_names(file: Path, groups: Sequence[Mapping], model: nn.Module, idle: Collection[str]) -> list[list[str]]:
    """Names of the parameters of each group, in the order of its `params`."""
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return _own_names(file, [list(group["params"]) for group in groups], model)
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return _own_names(file, [list(group.get("param_names", ())) for group in groups], model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sizes = [len(group["params"]) for group in groups]
    # As the model is; as it was before what is idle was set aside; with what has been frozen since.
    whole, decayed = [name for name, _ in model.named_parameters()], _decayed_names(model)
    for held in (trainable, trainable | set(idle), set(whole)):
        for layout in _layouts([name for name in whole if name in held], decayed):
            if sizes == [len(names) for names in layout]:
                return layout
    one, two = _layouts(sorted(trainable), decayed)
    raise StateError(
        f"{file}: expected param groups of [{len(one[0])}] parameters, or of [{len(two[0])}, {len(two[1])}] with and "
        f"without decay, as the model has them; got {sizes}: the state of another model, or other groups (where layers "
        f"were frozen in training, freeze them here before); {_LIVE}"
    )


def _own_names(file: Path, names_by_group: list[list[str]], model: nn.Module) -> list[list[str]]:
    """Names as the model has them: without what DistributedDataParallel and torch.compile put before them, and of a
    shared parameter the first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}

    def plain(name: str) -> str:
        bare = name if name in own else re.sub(r"^(?:module\.)+", "", name.replace("_orig_mod.", ""))
        return own.get(bare, name)

    plain_by_group = [[plain(name) for name in names] for names in names_by_group]
    counts = Counter(name for names in plain_by_group for name in names)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise StateError(
            f"{file}: expected {twice} once, got it {counts[twice]} times, as where a shared weight was given by each "
            "of its names: torch steps it as often"
        )
    return plain_by_group


def _layouts(names: list[str], decayed: Collection[str]) -> tuple[list[list[str]], list[list[str]]]:
    """`names` in one group, and in Trainer's two, with weight decay and without."""
    return [names], [[n for n in names if n in decayed], [n for n in names if n not in decayed]]


def _decayed_names(model: nn.Module) -> set[str]:
    from transformers import Trainer

    # The rule reads nothing of the trainer, and a real one would need arguments and a device.
    return set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model))
