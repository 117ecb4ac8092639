"""Digests that tell whether two runs would compute the same scores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from montessori.batching import Example
from montessori.errors import ArgumentError
from montessori.holdings import tensor_digest, value_digest
from montessori.quantised_layers import plain_tensors

_EDGE = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def columns_digest(examples: Iterable[Example]) -> str | None:
    """Hash of the rows that examples keep for a loss of the user's own; None where they keep none."""
    digest, kept = hashlib.sha256(), False
    for example in examples:
        if example.row:
            digest.update(value_digest(example.row))
            kept = True
    return digest.hexdigest() if kept else None


def sums_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, of the first and last values of each tensor and of a sum over all: tells other weights apart in
    the time that reading them takes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        for part in plain_tensors(tensor.detach()):
            flat = part.contiguous().reshape(-1)
            edges = torch.cat([flat[:_EDGE], flat[-_EDGE:]])
            # Of the bits, as integers, whose sum no order changes.
            bits = flat.view(_INTEGERS[min(flat.element_size(), 8)]) if flat.numel() else flat
            total = int(bits.sum(dtype=torch.int64))
            digest.update(f"{name}|{list(part.shape)}|{total}".encode() + tensor_digest(edges))
    return digest.hexdigest()


def sets_digest(sets: Mapping[str, Iterable[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in sets.items():
        digest.update(f"{name}={examples_digest(examples)};".encode())
    return digest.hexdigest()


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
    """Raise ArgumentError when `out` is a file that is read, or lies in a folder that is: what is written there would
    change it.

    `folders`: by option, the path of a file or folder, a name that is neither, or None.
    """
    place = _real(out)
    for name, path in folders.items():
        read = None if path is None else _real(path)
        if read is not None and (place == read or (read.is_dir() and read in place.parents)):
            raise ArgumentError(
                f"{option} {out}: expected a path outside of {path}, which {name} reads: what is written there would "
                "change it"
            )


def _real(path: str | os.PathLike[str]) -> Path:
    # As Path has it, but for a user or a loop of links that it raises at.
    return Path(os.path.realpath(os.path.expanduser(path)))
