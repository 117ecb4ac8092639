"""Rows of JSON Lines, JSON, CSV and Parquet files, and of folders of them, each with its address."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from montessori.errors import DataError
from montessori.wording import one_line

SUPPORTED = (
    ".jsonl, .ndjson, .json-lines, .json or .csv (each also as .gz or .zst), .parquet, a folder of such files or a "
    "directory written by datasets.save_to_disk"
)

_PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows in the order of the input, each a dict from column name to plain Python values.

    `source` is a file name, or "candidates" / "reference" for rows that came from memory. `parts` are the
    files of a folder, each with the number of its first row.
    """

    rows: Sequence[dict] = field(repr=False)
    source: str
    unit: str = "row"
    first: int = 0
    parts: tuple[tuple[int, Rows], ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def part(self, start: int, stop: int | None = None) -> Rows:
        """The rows from `start` up to `stop`, neither below 0, each with the address that it has here."""
        parts = tuple((first - start, part) for first, part in self.parts)
        return replace(self, rows=self.rows[start:stop], first=self.first + start, parts=parts)

    def where(self, index: int) -> str:
        """The address of a row: "data.jsonl, line 13", from 1; or "data.parquet, row 12", from 0.

        Of a folder it names the file in it: "folder/data.jsonl, line 13".
        """
        if self.parts:
            start, part = self.parts[bisect_right(self.parts, index, key=lambda entry: entry[0]) - 1]
            return part.where(index - start)
        return f"{self.source}, {self.unit} {index + self.first}"


def is_data_file(path: Path) -> bool:
    """Whether the name says that `read_file` reads it."""
    return _suffix(path) is not None


def read_file(path: Path, source: str | None = None) -> Rows:
    """The rows of a file, which may be none; `source` is how errors call it, by default its name.

    Raises DataError, naming file and line, if it cannot be read or a row is not an object.
    """
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(f"{path}: expected {SUPPORTED}, got the extension {path.suffix!r}")
    try:
        return _READERS[suffix](path, source or path.name)
    # The last two are what a gzip file that was cut off or damaged raises; of Zstandard it is an OSError.
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); check the file") from error


def read_folder(path: Path) -> Rows:
    """The rows of all data files that lie in the folder itself, in the order of their names; errors as `read_file`.

    Files that are no data, and those with a name that begins with "." or "_", are left out.
    """
    try:
        files = sorted(file for file in path.iterdir() if file.name[0] not in "._" and is_data_file(file))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); check the folder") from error
    if not files:
        raise DataError(f"{path}: expected {SUPPORTED}; none of these files lies in the folder itself")
    # One kind of file beside another is often a description of the data, which must not become a row.
    kinds = {"json" if "json" in suffix else suffix: file.name for file in files if (suffix := _suffix(file))}
    if len(kinds) > 1:
        raise DataError(f"{path}: expected data files of one kind, got {', '.join(kinds.values())}; name one file")
    rows: list[dict] = []
    parts: list[tuple[int, Rows]] = []
    folder = path.absolute().name
    for file in files:
        part = read_file(file, f"{folder}/{file.name}")
        parts.append((len(rows), part))
        rows += part.rows
    return Rows(rows, source=folder, parts=tuple(parts))


def from_table(rows: Iterable[dict[str, Any]], source: str) -> Rows:
    """Rows of a table, without the fields of structs that are None: it writes them where other rows have a value."""
    return Rows([{column: without_fillers(value) for column, value in row.items()} for row in rows], source=source)


def without_fillers(value: Any) -> Any:
    """The value without those fields of its structs that are None."""
    if isinstance(value, dict):
        return {key: without_fillers(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_fillers(entry) for entry in value]
    return value


def _suffix(path: Path) -> str | None:
    """The key in _READERS; None for a file of another kind."""
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        suffix = Path(path.stem).suffix.lower()
        # Parquet compresses inside.
        return suffix if suffix in _READERS and suffix != ".parquet" else None
    return suffix if suffix in _READERS else None


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    packing = path.suffix.lower()
    if packing == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as content:
            yield io.BufferedReader(content)
        return
    with path.open("rb") as file:
        if packing != ".gz":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as content:
            yield content


def _read_lines(path: Path, source: str) -> Rows:
    with _opened(path) as file:
        return _from_lines(file, source, "one JSON object per line")


def _read_json(path: Path, source: str) -> Rows:
    with _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    # Many name files .json that hold one object per line.
    if not content.lstrip().startswith(b"["):
        return _from_lines(io.BytesIO(content), source, "a JSON array of objects, or one JSON object per line")
    rows = _parsed(content, source, "file", "a JSON array of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {index}: expected a JSON object, got {type(row).__name__}")
    return Rows(rows, source)


def _from_lines(lines: Iterable[bytes], source: str, expected: str) -> Rows:
    rows: list[dict] = []
    empty = None
    for number, line in enumerate(lines, start=1):
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        # At the end of a file an empty line means nothing; in the middle a row may be lost.
        if not raw.strip():
            empty = empty or number
            continue
        if empty:
            raise DataError(f"{source}, line {empty}: expected a JSON object, the line is empty; remove the line")
        row = _parsed(raw, f"{source}, line {number}", "line", expected)
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return Rows(rows, source, unit="line", first=1)


def _parsed(raw: bytes, where: str, unit: str, expected: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, byte {error.start} of the {unit} is {raw[error.start]:#04x}; "
            f"convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected {expected}, got malformed JSON ({one_line(error)})") from error


def _read_csv(path: Path, source: str) -> Rows:
    import pandas

    try:
        with _opened(path) as file:
            # At the end of a file an empty line means nothing; in the middle it is a row without texts.
            content = file.read().decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 ({one_line(error)}); convert the file to UTF-8") from error
    try:
        header = Counter(next(csv.reader(io.StringIO(content)), []))
    except csv.Error as error:
        raise DataError(f"{source}: expected a CSV file with a header ({error})") from error
    twice = next((name for name, count in header.items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{source}: expected each column once, got {twice!r} {header[twice]} times")
    try:
        # "NA" and "007" are texts like others, and an empty cell is an empty one.
        frame = pandas.read_csv(io.StringIO(content), dtype=str, na_filter=False, skip_blank_lines=False)
    except pandas.errors.EmptyDataError:
        return Rows([], source)
    except ValueError as error:
        raise DataError(f"{source}: expected a CSV file with a header ({one_line(error)})") from error
    # pandas takes the first cells for names of rows where the first row has more cells than the header.
    if not isinstance(frame.index, pandas.RangeIndex):
        raise DataError(
            f"{source}, row 0: expected as many cells as the header has, {frame.shape[1]}, got more; put texts with "
            "commas between quotes"
        )
    return Rows(frame.to_dict("records"), source)


def _read_parquet(path: Path, source: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: expected a Parquet file ({one_line(error)})") from error
    return from_table(table.to_pylist(), source)


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json-lines": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
