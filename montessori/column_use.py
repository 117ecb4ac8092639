"""Which columns of some rows are read, and which are passed over: the order of COLUMN_SETS chooses in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from montessori.batching import LABEL_MASKS, PACKING, TOKEN_TYPES
from montessori.columns import MEDIA_COLUMNS, TEXT_COLUMNS, column_set, read_beside
from montessori.errors import DataError
from montessori.files import Rows
from montessori.wording import clipped

# What is read beside token ids, or checked.
_BESIDE_TOKENS = {"attention_mask", *PACKING, *TOKEN_TYPES}


@dataclass
class ColumnUse:
    """Of some rows the sets of columns that they are read by, and the other columns that hold something.

    Each with the number of its rows.
    """

    sets: Counter[tuple[str, ...]] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[Any, Any], columns: tuple[str, ...]) -> None:
        """Count a row that is read by `columns`, as `column_set` gives them."""
        self.sets[columns] += 1
        read = _read_columns(row, columns)
        self.unread.update(str(column) for column, value in row.items() if column not in read and not _is_empty(value))

    def line(self, source: str) -> str:
        """What an engineer has to know of the rows of `source`, such as "a.jsonl: read as text (4 rows)"."""
        total = self.sets.total()
        ordered = sorted(self.sets.items(), key=lambda entry: (-entry[1], entry[0]))
        read = ", ".join(f"{' + '.join(columns)} ({_rows(count)})" for columns, count in ordered)
        unread = ", ".join(
            column if count == total else f"{column} ({_rows(count)})" for column, count in sorted(self.unread.items())
        )
        return clipped(f"{source}: read as {read}" + (f"; not read: {unread}" if unread else ""))

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The same as plain values, for JSON."""
        return {
            "read": {" + ".join(columns): count for columns, count in sorted(self.sets.items())},
            "not_read": dict(sorted(self.unread.items())),
        }


def column_use(rows: Rows) -> ColumnUse:
    """That of all `rows` but those that hold none of the sets, which are an error where they are read."""
    use = ColumnUse()
    for index, row in enumerate(rows):
        with suppress(DataError):
            use.add(row, column_set(row, rows.where(index)))
    return use


def column_lines(tables: Iterable[Rows]) -> list[str]:
    """One line for each of the `tables` that has a row to be read."""
    uses = [(rows.source, column_use(rows)) for rows in tables]
    return [use.line(source) for source, use in uses if use.sets]


def _read_columns(row: Mapping[Any, Any], columns: tuple[str, ...]) -> set[str]:
    read = {*columns, *MEDIA_COLUMNS}
    if columns == TEXT_COLUMNS:
        return read
    if columns[0] != "input_ids":
        return read | read_beside(row, columns)
    return read | _BESIDE_TOKENS | (set() if "labels" in columns else {*LABEL_MASKS})


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    # Not of everything that has a length: a tensor of no dimension has none.
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"
