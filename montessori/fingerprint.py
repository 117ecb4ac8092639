"""Digests that tell whether two runs would compute the same scores."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from montessori.batching import Example
from montessori.errors import ArgumentError
from montessori.live import module_numbers

_EDGE = 64
# What these define changes with their version alone.
_LIBRARIES = frozenset({
    "accelerate", "datasets", "montessori", "numpy", "pandas", "peft", "pyarrow", "rich", "tokenizers", "torch", "tqdm",
    "transformers", "trl",
})  # fmt: skip


def installed(*names: str) -> dict[str, str]:
    """Versions of these packages; "none" for what is not installed, such as this package in a checkout."""
    found = dict.fromkeys(names, "none")
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def examples_digest(examples: Iterable[Example]) -> str:
    """Hash of row numbers and contents, in the order given."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.index}:".encode() + example.digest())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Hash of names, dtypes and values of all parameters and buffers, and of the numbers that modules hold."""
    digest = hashlib.blake2b(repr(module_numbers(model)).encode(), digest_size=32)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def edges_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names and of the first and last values of each tensor: tells other weights apart in no time."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        edges = torch.cat([flat[:_EDGE], flat[-_EDGE:]])
        digest.update(f"{name}|{list(tensor.shape)}".encode() + _tensor_content(edges))
    return digest.hexdigest()


def sets_digest(sets: Mapping[str, Iterable[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in sets.items():
        digest.update(f"{name}={examples_digest(examples)};".encode())
    return digest.hexdigest()


def function_digest(function: Callable[..., Any]) -> str:
    """Name of a function or of a callable's class, and a hash of its code and of the values that it holds: arguments,
    closures, attributes and globals, of tensors and models the content. What libraries define counts by its name."""
    digest = hashlib.sha256()
    for part in _held(function, {}):
        digest.update(part + b";")
    while isinstance(function, partial):
        function = function.func
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}:{digest.hexdigest()}"


def _held(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """What `value` is made of, the same in every process, each object once."""
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        yield repr(value).encode()
        return
    if id(value) in seen:
        return
    # Kept alive, so that no other takes its place.
    seen[id(value)] = value
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if isinstance(value, Tensor):
        yield _tensor_content(value)
    elif isinstance(value, nn.Module):
        yield model_digest(value).encode()
    elif isinstance(value, set | frozenset):
        # A set's order changes from process to process.
        yield from sorted(b"".join(_held(entry, seen)) for entry in value)
    else:
        for part in _parts(value):
            yield from _held(part, seen)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, numpy.ndarray):
        return [value.tolist()]
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, type | ModuleType) or _is_of_library(type(value)) or not hasattr(value, "__dict__"):
        return []
    return [inspect.getattr_static(type(value), "__call__", None), vars(value)]


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from _code_parts(function.__code__)
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents
    if not _is_of_library(function):
        for name in sorted(_names(function.__code__)):
            yield function.__globals__.get(name)


def _is_of_library(kind: type | FunctionType) -> bool:
    root = (kind.__module__ or "").partition(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _tensor_content(tensor: Tensor) -> bytes:
    described = f"{tensor.dtype}{list(tensor.shape)}".encode()
    # Tensors without memory of their own, or of a layout that is no array.
    with suppress(RuntimeError, NotImplementedError, TypeError):
        value = tensor.detach().cpu().contiguous().reshape(-1)
        return described + hashlib.sha256(value.view(torch.uint8).numpy().data).digest()
    return described


def _code_parts(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant)
        else:
            # A set's order changes from process to process.
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode()


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the columns and values of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def content_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a directory, with the base of an adapter."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    if not files:
        raise ArgumentError(f"{path}: expected a file, or a directory that holds files")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path) if file != path else ''}|{file.stat().st_size}|".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    base = _local_base(path)
    if base is not None:
        digest.update(content_digest(base).encode())
    return digest.hexdigest()


def _local_base(adapter: Path) -> Path | None:
    """The directory of the model that an adapter of PEFT is for; None for one on the hub and for what is no adapter."""
    try:
        name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = Path(name).expanduser()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    inside = adapter.resolve() in (base.resolve(), *base.resolve().parents)
    return base if base.is_dir() and not inside else None


def check_outside(
    out: str | os.PathLike[str], option: str, folders: Mapping[str, str | os.PathLike[str] | None]
) -> None:
    """Raise ArgumentError when `out` lies in a folder that is read: what is written there would change it.

    `folders`: by option, the path of a file or folder, a name that is neither, or None.
    """
    place = Path(out).expanduser().absolute().resolve()
    for name, path in folders.items():
        folder = None if path is None else Path(path).expanduser().resolve()
        if folder is not None and folder.is_dir() and (place == folder or folder in place.parents):
            raise ArgumentError(
                f"{option} {out}: expected a path outside of {path}, which {name} reads: what is written there would "
                "change it"
            )
