"""What others wrote, fit to stand inside an error of ours."""

from __future__ import annotations

import reprlib


def one_line(error: BaseException | str) -> str:
    """A text, such as the message of an error of another library, on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its kind: what follows is often a trace or advice."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def short(value: object) -> str:
    """A value of a row."""
    return " ".join(reprlib.repr(value).split())


def clipped(error: BaseException | str, most: int = 300) -> str:
    """`one_line`, of at most so many characters: torch's errors may show whole models."""
    text = one_line(error)
    return text if len(text) <= most else f"{text[:most]}..."
