"""Triton's interpreter without what takes most of its time and changes nothing."""

from __future__ import annotations

import dataclasses
from types import FunctionType

from triton.runtime import interpreter


def hurry_the_interpreter() -> None:
    """For the rest of the process.

    It goes through every name of its language for each launch and each call of a function within. What it puts there
    depends on the modules of the language that a file imports alone: once is enough. And it computes whether whole
    numbers overflow, but only looks at the answer when debugging.
    """
    patch, kept = interpreter._patch_lang, {}

    def patched(function: FunctionType) -> object:
        # What is returned takes back what was changed; an empty one leaves it.
        file = function.__globals__["__name__"]
        if file not in kept:
            kept[file] = type(patch(function))
        return kept[file]()

    interpreter._patch_lang = patched
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
