"""Triton's interpreter, made faster where only its own looking around takes the time."""

from __future__ import annotations

from types import FunctionType

from triton.runtime import interpreter


def patch_the_language_once() -> None:
    """Leave the language as the interpreter patches it, for the rest of the process.

    It would go through every name of the language for each launch and each call of a function within: a fifth of all
    its time. What it puts there depends on the modules of the language that a file imports alone.
    """
    patch, kept = interpreter._patch_lang, {}

    def patched(function: FunctionType) -> object:
        # Its result takes back what it has changed: an empty one is returned.
        file = function.__globals__["__name__"]
        if file not in kept:
            kept[file] = type(patch(function))
        return kept[file]()

    interpreter._patch_lang = patched
