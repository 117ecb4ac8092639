"""Digests that tell whether two runs would compute the same scores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from montessori.batching import Example
from montessori.errors import ArgumentError
from montessori.live import module_numbers


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


def sets_digest(sets: Mapping[str, Iterable[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in sets.items():
        digest.update(f"{name}={examples_digest(examples)};".encode())
    return digest.hexdigest()


def function_digest(function: Callable[..., Any]) -> str:
    """Name of a function or of a callable's class, and a hash of its code and the numbers and texts it holds."""
    held: list[Any] = []
    while isinstance(function, partial):
        held += [*function.args, *function.keywords.items()]
        function = function.func
    held += getattr(function, "__defaults__", None) or ()
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    digest = hashlib.sha256(repr([value for value in held if isinstance(value, int | float | str | tuple)]).encode())
    for part in _code_parts(code) if code is not None else ():
        digest.update(part)
    return f"{named.__module__}.{named.__qualname__}:{digest.hexdigest()}"


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
