"""Rows of generated text on disk, and what the student sees of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from montessori.data import Rows, load_rows
from montessori.encoding import Encoded
from montessori.errors import ArgumentError, DataError
from montessori.options import check_positions, default_max_length


def student_rows(path: Path) -> Rows:
    """What the student learns from a file of generated rows: instruction and response alone, in file order.

    Generated rows also carry the prompt and completion of the teacher, which must not reach the student.
    """
    rows = load_rows(path)
    for index, row in enumerate(rows):
        if not {"instruction", "response"} <= row.keys():
            raise DataError(f"{rows.where(index)}: expected the columns instruction and response, got {', '.join(row)}")
    plain = [{"instruction": row["instruction"], "response": row["response"]} for row in rows]
    return replace(rows, rows=plain)


def length_limit(model: Any, max_length: int | None, section: str) -> int:
    """`max_length` of a section of the settings, by default the model's; ArgumentError beyond its positions."""
    if max_length is None:
        return default_max_length(model)
    try:
        check_positions(model, max_length)
    except ArgumentError as error:
        raise ArgumentError(f"{section}.{error}") from error
    return max_length


def check_learnable(encoded: Encoded, data: Path, section: str) -> None:
    """Raise DataError where no row of `data` has a token to learn within the `max_length` of this section."""
    if not encoded.examples:
        reasons = ", ".join(sorted(set(encoded.skipped.values())))
        raise DataError(
            f"{data}: none of {encoded.num_rows} rows has a token to learn ({reasons}): raise {section}.max_length"
        )
