"""Rows of text or token ids from files, the hub, datasets, tables and iterables.

Every row keeps an address, so that an error about it names the file and the line.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from montessori.columns import COLUMN_SETS, TEXT_COLUMNS
from montessori.errors import ArgumentError, DataError
from montessori.files import SUPPORTED, Rows, from_table, is_data_file, read_file, read_folder
from montessori.wording import one_line

# datasets, pandas and pyarrow are imported where they are used: together they take longer to import
# than a JSONL file takes to read.
if TYPE_CHECKING:
    import datasets
    import pandas
    import pyarrow

_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_ROW_COLUMNS = [
    columns for columns in COLUMN_SETS if not {*columns} & {"conversation", "query", "question", "problem", "answer"}
]
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def is_row(source: Mapping) -> bool:
    """Whether a mapping is one row, rather than sets of rows by names that happen to be those of columns.

    Names that sets may well have, such as question and answer, do not make a row.
    """
    has_columns = any(source.keys() >= {*columns} for columns in _ROW_COLUMNS)
    return has_columns and not all(_begins_with_row(value) for value in source.values())


def _begins_with_row(value: object) -> bool:
    # Messages have a role and a content, or from and value.
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and is_row(first)


def load_rows(
    source: str | os.PathLike | datasets.Dataset | pandas.DataFrame | pyarrow.Table | Iterable[Mapping],
    *,
    split: str = "train",
    name: str = "candidates",
) -> Rows:
    """Rows of `source`, all of them in memory.

    `source` is a path to a .jsonl (.ndjson, .json-lines), .json or .csv file, each also as .gz or .zst, or a
    .parquet file; a folder of files of one of these kinds, read in the order of their names; a directory written by
    `datasets.save_to_disk`; the name of a dataset on the hub; a Dataset or DatasetDict, a pandas DataFrame, a
    pyarrow Table, or an iterable of dicts. `split` selects from a DatasetDict and from the hub. `name` is how
    errors call rows that come from memory. `Rows` are returned as they are.

    A .json file holds an array of objects, or one object per line. Cells of a .csv file are texts. In structs
    of tables (messages, tools) fields without a value are left out, as they are in JSONL.

    Raises DataError, naming file and line, if the source cannot be read, holds no row, or a row is not
    an object; ArgumentError if `source` is none of the above.
    """
    if isinstance(source, Rows):
        return source
    rows = _from_name(source, split) if isinstance(source, str | os.PathLike) else _from_memory(source, split, name)
    if len(rows) == 0:
        raise DataError(f"{rows.source}: expected at least one row, the source is empty")
    return rows


def _from_name(source: str | os.PathLike, split: str) -> Rows:
    if not str(source):
        raise DataError(f"expected {SUPPORTED}, or the name of a dataset on the hub, got an empty name")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _from_saved(path, split) if any((path / file).is_file() for file in _SAVED) else read_folder(path)
    if os.path.exists(path):
        return read_file(path)
    # Anything that no dataset can be called is a mistyped path, and asking the hub for it would hide that.
    if isinstance(source, os.PathLike) or is_data_file(path) or not _HUB_NAME.fullmatch(source):
        shown = one_line(str(path))
        shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
        raise DataError(f"{shown}: no such file; expected {SUPPORTED}, or the name of a dataset on the hub")
    return _from_hub(source, split)


def _from_saved(path: Path, split: str) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a directory written by datasets.save_to_disk ({one_line(error)})") from error
    return _from_dataset(saved, split, path.absolute().name, f"datasets.load_from_disk({str(path)!r})")


def _from_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    # The hub client, the HTTP stack and the dataset builders each raise errors of their own families,
    # which share no base but Exception; the original stays attached as the cause.
    except Exception as error:
        raise DataError(
            f"{name!r}: expected {SUPPORTED}, or the name of a dataset on the hub; there is no such path and "
            f"loading split {split!r} from the hub failed ({type(error).__name__}: {one_line(error)}); another split "
            f"is datasets.load_dataset({name!r}, split=...)"
        ) from error
    return _from_dataset(loaded, split, name, "dataset")


def _from_dataset(loaded: datasets.Dataset | datasets.DatasetDict, split: str, source: str, code: str) -> Rows:
    """Rows of a dataset, or of its split; `code` is how a caller gets at the dataset."""
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{source}: expected a split {split!r}, got the splits {', '.join(loaded)}; choose one: "
                f"{code}[{next(iter(loaded), split)!r}]"
            )
        loaded = loaded[split]
    return from_table(loaded.to_list(), source)


def _from_memory(source: object, split: str, name: str) -> Rows:
    # Whoever has a table has imported its library; rows in a list do without.
    datasets, pandas, pyarrow = map(sys.modules.get, ("datasets", "pandas", "pyarrow"))
    if datasets is not None and isinstance(source, datasets.Dataset | datasets.DatasetDict):
        return _from_dataset(source, split, name, "dataset")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return from_table(_records(source), name)
    if pyarrow is not None and isinstance(source, pyarrow.Table):
        return from_table(source.to_pylist(), name)
    if isinstance(source, Mapping) and any(source.keys() >= {*columns} for columns in (*COLUMN_SETS, TEXT_COLUMNS)):
        raise ArgumentError(
            f"{name}: expected a list of rows, got one dict with the columns {', '.join(map(str, source))}; wrap the "
            f"row in a list, [row], or whole columns in datasets.Dataset.from_dict(columns)"
        )
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise ArgumentError(
            f"{name}: expected a path, the name of a dataset, a Dataset, a DataFrame, a Table or an iterable of "
            f"dicts, got {type(source).__name__}"
        )
    rows = []
    for index, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {index}: expected a dict, got {type(row).__name__}")
        rows.append(dict(row))
    return Rows(rows, source=name)


def _records(frame: pandas.DataFrame) -> Iterator[dict]:
    # pandas marks a missing cell with NaN, which is a float where a text is expected.
    cells = frame.astype(object).where(frame.notna(), None)
    for record in cells.to_dict("records"):
        yield {str(column): _plain(value) for column, value in record.items()}


def _plain(value: object) -> object:
    """The value with numpy arrays, which Parquet readers put into DataFrames, turned into lists."""
    if isinstance(value, numpy.ndarray):
        return _plain(value.tolist()) if value.dtype == object else value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
