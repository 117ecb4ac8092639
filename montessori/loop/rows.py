"""Rows of generated text on disk, and what the student sees of them."""

from __future__ import annotations

from pathlib import Path

from montessori.data import Rows, load_rows
from montessori.errors import DataError


def student_rows(path: Path) -> Rows:
    """What the student learns from a file of generated rows: instruction and response alone, in file order.

    Generated rows also carry the prompt and completion of the teacher, which must not reach the student.
    """
    rows = load_rows(path)
    for index, row in enumerate(rows):
        if not {"instruction", "response"} <= row.keys():
            raise DataError(f"{rows.where(index)}: expected the columns instruction and response, got {', '.join(row)}")
    plain = [{"instruction": row["instruction"], "response": row["response"]} for row in rows]
    return Rows(plain, rows.source, rows.unit, rows.first)
