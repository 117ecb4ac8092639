"""What others wrote, fit to stand inside an error of ours."""

from __future__ import annotations

import reprlib


def one_line(error: BaseException | str) -> str:
    """A text, such as the message of an error of another library, on one line."""
    return " ".join(str(error).split())


def short(value: object) -> str:
    """A value of a row."""
    return " ".join(reprlib.repr(value).split())
