"""A model and an optimizer as their owner holds them: inside contexts of mixed precision, and trained between calls."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from montessori.errors import ModelError
from montessori.optim_state import AdamWState
from montessori.optimizers import moments_of, settings_of
from montessori.parameters import is_plain, version, versions
from montessori.shared import Shared

# Shape of the blocks that a checksum reads: 512 kB of eight bytes, which a processor's cache holds.
_COLUMNS, _ROWS = 256, 256
# Attributes of a module that do not change what it computes here, where every module is in eval mode.
_IDLE = {"training", "name_or_path", "warnings_issued"}
# Values of a buffer that is put back: what counts tokens is small, what holds quantised weights is not written.
_MOST_COUNTED = 1 << 20
# transformers notes here that a model has the hooks by which it collects hidden states.
_HOOKS_INSTALLED = {"_output_capturing_hooks_installed"}
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """The model for oneself: other threads that would score it wait. Where an error or an interrupt ends this, whenever
    it comes, modes, hooks and gradients are as they were before; buffers are in any case."""
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        put_back, counted = _arrangement(model), _buffers(model)
        try:
            yield
        except BaseException:
            to_the_end(put_back)
            raise
        finally:
            to_the_end(counted)


def _buffers(model: nn.Module) -> Callable[[], None]:
    """What puts back the values that forward passes have written into buffers, such as counts of an expert's tokens.

    A buffer that was replaced, as by a longer table of positions, stays so: other attributes tell of it.
    """
    found = [(module, key, buffer) for module in model.modules() for key, buffer in module.named_buffers(recurse=False)]
    kept = [
        (module, key, buffer, buffer.detach().clone())
        for module, key, buffer in found
        if is_plain(buffer) and buffer.numel() <= _MOST_COUNTED and buffer.layout is torch.strided
    ]

    @torch.no_grad()
    def put_back() -> None:
        for module, key, buffer, before in kept:
            if module._buffers.get(key) is buffer and not torch.equal(buffer, before):
                buffer.copy_(before)

    return put_back


def _arrangement(model: nn.Module) -> Callable[[], None]:
    """What puts back all that is not a value: modes, forwards, hooks, which parameters train, gradients."""
    modules = []
    for module in model.modules():
        attributes = vars(module)
        tables = [table for key, table in attributes.items() if "_hooks" in key and isinstance(table, dict)]
        hooks = [(table, dict(table)) for table in tables]
        installed = {key: attributes[key] for key in _HOOKS_INSTALLED & attributes.keys()}
        modules.append((module, module.training, attributes.get("forward"), hooks, installed))
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def put_back() -> None:
        for module, training, forward, hooks, installed in modules:
            module.training = training
            for key in _HOOKS_INSTALLED & vars(module).keys() - installed.keys():
                del vars(module)[key]
            if forward is not None:
                vars(module)["forward"] = forward
            else:
                vars(module).pop("forward", None)
            for table, before in hooks:
                for key in table.keys() - before.keys():
                    del table[key]
        for parameter, trained, grad in parameters:
            parameter.requires_grad_(trained)
            parameter.grad = grad

    return put_back


def to_the_end(work: Callable[[], object]) -> None:
    """Do `work`, which can be done again, whole: an interrupt in the midst of it comes after it."""
    interrupt = None
    while True:
        try:
            work()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def undisturbed(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Raises ModelError if somebody else, such as a training loop in another thread, writes a parameter inside."""
    before = {name: version(parameter) for name, parameter in parameters.items()}

    def check(cause: Exception | None = None) -> None:
        written = next((name for name, parameter in parameters.items() if version(parameter) != before[name]), None)
        if written is not None:
            raise ModelError(
                f"{written} was written while the model was scored, when weights are moved and put back: by another "
                "thread that trains it (score between steps, or a copy of the model) or by its own forward pass (which "
                "cannot be scored)"
            ) from cause

    try:
        yield
    except RuntimeError as error:
        check(error)
        raise
    check()


# The stance is that of all threads.
_EAGER = Shared(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Gradients on and autocast off, that which accelerate has built into the model's forward included.

    A step of 5e-6 is lost in bfloat16: everything is computed in the dtype of the weights. What torch.compile made runs
    as it was written: hooks and products of our own are not for its compiler.
    """
    device = next(model.parameters()).device.type
    attributes = vars(model)
    forward = attributes.get("forward")
    aside = forward is not None and "_original_forward" in attributes
    if aside:
        attributes["forward"] = attributes["_original_forward"]
    try:
        eager = _EAGER.on() if "torch._dynamo" in sys.modules else nullcontext()
        # A default device of the owner's would also be that of offsets and sums, which belong on the host.
        host = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        exact = torch.autocast(device, enabled=False)
        with host, torch.inference_mode(False), torch.enable_grad(), exact, eager, _made_anew():
            yield
    finally:
        if aside:
            attributes["forward"] = forward


@contextmanager
def _made_anew() -> Iterator[None]:
    """Weights that are made of others are made in every pass, whatever the owner keeps by `parametrize.cached`: of
    moved weights they are others."""
    kept = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = kept


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and the wrappers of data parallelism, whose backward pass would average the
    gradients of different candidates."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class Watch:
    """Notices what the owner of a model and its optimizer changes between two calls.

    `optimizer`: a live one, an AdamWState, or the path of a checkpoint, which does not move.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer
        self.accept()

    def changes(self) -> tuple[bool, bool]:
        """Whether the model is another, and whether a value or a setting of the optimizer is."""
        moved = self._versions != self._now() or self._sums != self._bits() or self._kept != self._attributes()
        return self._fixed != _fixed_parts(self._model), moved

    def accept(self) -> None:
        """What is there now is what later changes are seen against."""
        self._sums = self._bits()
        self.settle()

    def settle(self) -> None:
        """Take what is there now as unchanged: our own steps, taken back, have raised the version counters."""
        self._fixed, self._versions, self._kept = _fixed_parts(self._model), self._now(), self._attributes()

    def _moments(self) -> list[Any]:
        if isinstance(self._optimizer, AdamWState):
            return [tensor for state in self._optimizer.values() for _, tensor in state.tensors()]
        return moments_of(self._optimizer)

    def _now(self) -> tuple[Any, ...]:
        return versions([*self._model.parameters(), *self._moments()]), settings_of(self._optimizer)

    def _bits(self) -> tuple[int, ...]:
        """Checksums of all tensors: a write past torch (`.data`, numpy) leaves the versions as they are."""
        return _bit_sums([*self._model.parameters(), *self._model.buffers(), *self._moments()])

    def _attributes(self) -> tuple[int, ...]:
        """Checksums of what modules hold beside parameters and buffers. Our own passes may leave something there."""
        held = (tensors_in(value) for _, _, value in _beside_tables(self._model))
        return _bit_sums([tensor for tensors in held for tensor in tensors if tensor.is_leaf])


def module_numbers(model: nn.Module) -> tuple[tuple[str, str, str], ...]:
    """What modules keep beside their tensors: an epsilon, the scale of an adapter, which adapters are merged."""
    held = _beside_tables(model)
    return tuple((name, key, repr(value)) for name, key, value in held if key not in _IDLE and _is_number(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """A tensor, or those in lists, tuples and dicts of such."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def _beside_tables(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(name of a module, attribute, value) of all attributes but the tables of parameters, buffers and modules."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                yield name, key, value


def _fixed_parts(model: nn.Module) -> tuple[Any, ...]:
    """What a proof of the capture rests on: the parameters, which of them are trained, numbers that modules and the
    config hold, such as a cap, and the functions that make up the forward pass."""
    parameters = tuple((name, id(entry), entry.requires_grad) for name, entry in model.named_parameters())
    settings = getattr(getattr(model, "config", None), "to_dict", dict)
    return parameters, module_numbers(model), repr(settings()), _functions(model)


def _functions(model: nn.Module) -> list[Any]:
    found: list[Any] = [(name, type(module).forward) for name, module in model.named_modules()]
    hooked = ((name, parameter._backward_hooks) for name, parameter in model.named_parameters())
    found += [(name, list(hooks.values())) for name, hooks in hooked if hooks]
    for name, key, value in _beside_tables(model):
        if key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found.append((name, list(value.values())))
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | partial):
            # `own_precision` takes accelerate's wrapper off the forward of the whole.
            found.append(
                (name, value if (name, key) != ("", "forward") else vars(model).get("_original_forward", value))
            )
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_number(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return all(_is_number(entry) for entry in value)
    return isinstance(value, bool | int | float | str)


def _bit_sums(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if is_plain(tensor) and tensor.numel() and tensor.layout is torch.strided:
            sums.setdefault(tensor.device, []).append(_bit_sum(tensor.detach()))
    return tuple(total for group in sums.values() for total in torch.stack(group).tolist())


def _bit_sum(tensor: Tensor) -> Tensor:
    """A number from all bits of a tensor and where they are: the sums of the rows and of the columns of its words."""
    flat = tensor.contiguous().reshape(-1)
    size = flat.numel() * flat.element_size()
    width = next(width for width in (8, 4, 2, 1) if size % width == 0)
    # A slice, or memory of somebody else's, may start where no wider number can.
    if flat.data_ptr() % width or flat.storage_offset() * flat.element_size() % width:
        flat = flat.clone()
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width])
    ragged = words[words.numel() // _COLUMNS * _COLUMNS :].long()
    columns, rows = torch.zeros(_COLUMNS, dtype=torch.int64, device=tensor.device), []
    whole = words[: words.numel() - ragged.numel()].view(-1, _COLUMNS)
    # On a GPU every block would be launches of its own.
    for block in whole.split(_ROWS) if whole.device.type == "cpu" else [whole]:
        # The sign of a double is the top bit of a word: two of them would vanish from a sum.
        block = block ^ (block >> 21) if tensor.dtype is torch.float64 else block
        rows.append(block.sum(1))
        columns += block.sum(0)
    return _weighted(torch.cat([columns, ragged, *rows]))


def _weighted(sums: Tensor) -> Tensor:
    weights = torch.arange(1, sums.numel() + 1, device=sums.device) * 0x9E3779B97F4A7C1
    weights = (weights ^ (weights >> 29)) * 0xBF58476D1CE4E5B
    # By halves: a difference in the top bit alone would be lost in a product with an even weight.
    return ((sums >> 32) * weights + (sums & 0xFFFFFFFF) * (weights ^ 0x5555555555)).sum()
