"""Digests of values, functions and models by what they hold, the same in every process.

What an installed package defines counts by its name, since it changes with the version alone; of its objects the
attributes count whose names stand in the code that is looked at, such as `args.beta` of TRL's settings.
"""

from __future__ import annotations

import datetime
import enum
import hashlib
import inspect
import numbers
import re
import sys
import sysconfig
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path, PurePath
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from montessori.live import module_numbers
from montessori.quantised_layers import plain_tensors

_LIBRARIES = frozenset({
    "accelerate", "datasets", "montessori", "numpy", "pandas", "peft", "pyarrow", "rich", "tokenizers", "torch", "tqdm",
    "transformers", "trl",
})  # fmt: skip
_INSTALLED = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Of these `repr` shows all.
_SHOWN = (numbers.Number, datetime.date, datetime.time, datetime.timedelta, PurePath, enum.Enum, range, slice)
_OF_MODULES = frozenset(vars(nn.Module()))


def function_digest(function: Callable[..., Any]) -> str:
    """Name of a function or of a callable's class, and a hash of its code and of the values that it holds: arguments,
    closures, attributes and globals, of tensors, tables and models the content."""
    named: Any = function
    while isinstance(named, partial):
        named = named.func
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}:{value_digest(function).hex()}"


def value_digest(value: Any) -> bytes:
    """Hash of a value and of all that it holds."""
    names: set[str] = set()
    while True:
        # Code that is found late may name attributes of objects that were looked at before.
        known = len(names)
        for _ in _Walk(names, contents=False).held(value):
            continue
        if len(names) == known:
            break
    digest = hashlib.sha256()
    for part in _Walk(names, contents=True).held(value):
        digest.update(part + b";")
    return digest.digest()


def held_modules(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules among all that a function holds, such as a teacher."""
    walk = _Walk(set(), contents=False)
    for _ in walk.held(function):
        continue
    return [value for value in walk.seen.values() if isinstance(value, nn.Module)]


def model_digest(model: nn.Module) -> str:
    """Hash of names, dtypes and values of all parameters and buffers, and of the numbers that modules hold."""
    digest = hashlib.blake2b(repr(module_numbers(model)).encode(), digest_size=32)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        for part in plain_tensors(tensor.detach()):
            value = part.cpu().contiguous()
            digest.update(f"{name}|{value.dtype}|{list(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    """Dtype, shape and a hash of the values."""
    described = f"{tensor.dtype}{list(tensor.shape)}".encode()
    # Tensors without memory of their own.
    with suppress(RuntimeError, NotImplementedError, TypeError):
        value = tensor.detach().to_dense().cpu().contiguous().reshape(-1)
        return described + hashlib.sha256(value.view(torch.uint8).numpy().data).digest()
    return described


class _Walk:
    """One way through all that a value holds, each object once. `names` are those of the code met so far; without
    `contents` tensors, arrays, images, models and tables are left out."""

    def __init__(self, names: set[str], contents: bool) -> None:
        self.names, self.contents = names, contents
        self.seen: dict[int, Any] = {}

    def held(self, value: Any) -> Iterator[bytes]:
        """Bytes of the value and of all that it holds, without recursion: what a function holds may be deep."""
        waiting = [iter([value])]
        while waiting:
            value = next(waiting[-1], waiting)
            if value is waiting:
                waiting.pop()
            elif isinstance(value, _PLAIN):
                yield repr(value).encode()
            elif id(value) not in self.seen:
                # Kept alive, so that no other takes its place.
                self.seen[id(value)] = value
                yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
                if isinstance(value, set | frozenset):
                    # A set's order changes from process to process.
                    yield from sorted(b"".join(self.held(entry)) for entry in value)
                else:
                    waiting.append(iter(self.parts(value)))

    def parts(self, value: Any) -> Iterable[Any]:
        """What a value is made of, as values."""
        if isinstance(value, list | tuple) and {type(entry) for entry in value} <= {*_PLAIN}:
            return [repr(value)]
        if isinstance(value, Tensor):
            return [tensor_digest(value)] if self.contents else []
        if isinstance(value, nn.Module):
            return self.of_module(value)
        if isinstance(value, numpy.ndarray):
            if value.dtype == object:
                return value.tolist()
            return [str(value.dtype), value.shape, value.tobytes()] if self.contents else []
        if isinstance(value, Mapping):
            return chain.from_iterable(value.items())
        if isinstance(value, tuple | list | deque):
            return list(value)
        if isinstance(value, _SHOWN):
            return [repr(value)]
        if isinstance(value, partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, BuiltinMethodType):
            return [value.__name__, *([] if isinstance(value.__self__, ModuleType) else [value.__self__])]
        if isinstance(value, FunctionType):
            return self.of_function(value)
        if isinstance(value, staticmethod | classmethod):
            return [value.__func__]
        if isinstance(value, property):
            return [value.fget]
        if callable(value) and hasattr(value, "__wrapped__"):
            # Of functools.lru_cache.
            return [value.__wrapped__]
        if isinstance(value, re.Pattern):
            return [value.pattern, value.flags]
        if _is_image(value):
            return [value.mode, value.size, value.tobytes()] if self.contents else []
        if isinstance(value, SimpleNamespace | Namespace):
            return chain.from_iterable(vars(value).items())
        if _is_table(value):
            return _of_table(value) if self.contents else []
        return self.of_object(value)

    def of_object(self, value: Any) -> Iterable[Any]:
        if isinstance(value, type):
            return [] if _is_of_library(value) else self.of_class(value)
        attributes = {**_of_slots(value), **getattr(value, "__dict__", {})}
        if isinstance(value, ModuleType) and _is_of_library(value):
            return []
        if _is_of_library(type(value)) and _is_frozen(value):
            return chain.from_iterable(attributes.items())
        if isinstance(value, ModuleType) or _is_of_library(type(value)):
            # Settings of a library, constants and helpers of a module: what the code reads of them.
            attributes = {name: attributes[name] for name in sorted(self.names & attributes.keys())}
            return chain.from_iterable(attributes.items())
        return [*self.of_class(type(value)), *chain.from_iterable(attributes.items())]

    def of_class(self, kind: type) -> list[Any]:
        """What the code met so far reads of a class or of those that it inherits from, and what it is called by."""
        own = [one for one in kind.__mro__ if not _is_of_library(one)]
        called = {name for one in own for name, entry in vars(one).items() if _is_special(name, entry)}
        names = sorted(name for name in self.names | called if any(name in vars(one) for one in own))
        return [part for name in names for part in (name, inspect.getattr_static(kind, name))]

    def of_function(self, function: FunctionType) -> Iterable[Any]:
        parts: list[Any] = [*_code_parts(function.__code__), function.__defaults__, function.__kwdefaults__]
        for cell in function.__closure__ or ():
            with suppress(ValueError):
                parts.append(cell.cell_contents)
        if not _is_of_library(function):
            names = _names(function.__code__)
            self.names |= names
            parts += [function.__globals__.get(name) for name in sorted(names)]
        return parts

    def of_module(self, value: nn.Module) -> Iterable[Any]:
        parts: list[Any] = [model_digest(value)] if self.contents else []
        for module in value.modules():
            if not _is_of_library(type(module)):
                held = {name: entry for name, entry in vars(module).items() if name not in _OF_MODULES}
                parts += [*self.of_class(type(module)), *chain.from_iterable(held.items())]
        return parts


def _is_special(name: str, entry: Any) -> bool:
    """Whether it is a method that nobody calls by its name."""
    return name == "forward" or (name.startswith("__") and name.endswith("__") and isinstance(entry, FunctionType))


def _is_frozen(value: Any) -> bool:
    """Whether it is nothing but its fields, whoever wrote it."""
    settings = getattr(value, "__dataclass_params__", None)
    return bool(getattr(settings, "frozen", False))


def _is_image(value: Any) -> bool:
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)
    return isinstance(kind, type) and isinstance(value, kind)


def _is_table(value: Any) -> bool:
    pandas, pyarrow, datasets = (sys.modules.get(name) for name in ("pandas", "pyarrow", "datasets"))
    kinds = [getattr(pandas, name, None) for name in ("DataFrame", "Series", "Index")]
    kinds += [getattr(pyarrow, "Table", None), getattr(datasets, "Dataset", None)]
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _of_table(value: Any) -> Iterable[Any]:
    import pyarrow

    if hasattr(value, "with_format"):
        value = value.with_format("arrow")[:]
    if not isinstance(value, pyarrow.Table):
        # A series, with its index, is a table of one column.
        frame = value.to_frame() if hasattr(value, "to_frame") else value
        return [str(frame.index.tolist()), [*map(str, frame.columns)], frame.to_dict("list")]
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(buffer, value.schema) as stream:
        # As one piece, however it was put together.
        stream.write_table(value.combine_chunks())
    return [hashlib.sha256(buffer.getvalue()).hexdigest()]


def _of_slots(value: Any) -> dict[str, Any]:
    if isinstance(value, type):
        return {}
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = chain.from_iterable([slot] if isinstance(slot, str) else slot for slot in slots)
    return {
        name: getattr(value, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    }


def _is_of_library(kind: Any) -> bool:
    module = kind.__name__ if isinstance(kind, ModuleType) else (getattr(kind, "__module__", None) or "")
    return _is_installed(module.partition(".")[0])


@lru_cache(maxsize=1024)
def _is_installed(root: str) -> bool:
    if root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__"):
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return any(Path(file).is_relative_to(place) for place in _INSTALLED)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _code_parts(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant)
        else:
            # A set's order changes from process to process.
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode()
