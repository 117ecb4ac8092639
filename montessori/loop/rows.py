"""Rows of generated text on disk, and what the student sees of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from montessori.data import Rows, load_rows
from montessori.errors import DataError, ResourceError


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all. Raises ResourceError when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror or error})") from error


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
