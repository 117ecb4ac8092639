"""Rows to try things with, written by the project: 80 mixed-quality candidate, 32 reference and 64 warm-up pairs."""

from __future__ import annotations

import importlib.resources
import pathlib

from montessori.errors import ArgumentError

_NAMES = ("candidates.jsonl", "reference.jsonl", "warmup.jsonl")


def demo_file(name: str) -> pathlib.Path:
    """Return the path of the demo file `name`: "candidates.jsonl", "reference.jsonl" or "warmup.jsonl"."""
    if name not in _NAMES:
        raise ArgumentError(f"name={name!r}: expected one of {', '.join(_NAMES)}")
    return pathlib.Path(str(importlib.resources.files("montessori.demo") / name))
