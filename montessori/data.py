"""Rows of text or token ids from files, the hub, datasets, DataFrames and iterables.

Every row keeps an address, so that an error about it names the file and the line.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from montessori.errors import ArgumentError, DataError

# datasets, pandas and pyarrow are imported where they are used: together they take longer to import
# than a JSONL file takes to read.
if TYPE_CHECKING:
    import datasets
    import pandas

# Arguments of apply_chat_template that say how a text is rendered, not what the template is told.
_RENDERING = frozenset({
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
# In the order in which they are looked for: exact token ids win over the text they came from.
TOKEN_COLUMNS = ("input_ids", "labels")
COLUMN_SETS = (TOKEN_COLUMNS, ("messages",), ("prompt", "completion"), ("instruction", "response"))
JSONL_SUFFIXES = (".jsonl", ".json-lines")
PARQUET_SUFFIXES = (".parquet",)
SUPPORTED = ".jsonl, .json-lines, .parquet or a directory written by datasets.save_to_disk"


@dataclass(frozen=True)
class Rows(Sequence):
    """Rows in the order of the input, each a dict from column name to plain Python values.

    `source` is a file name, or "candidates" / "reference" for rows that came from memory.
    """

    rows: Sequence[dict] = field(repr=False)
    source: str
    unit: str = "row"
    first: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def where(self, index: int) -> str:
        """The address of a row: "data.jsonl, line 13", from 1; or "data.parquet, row 12", from 0."""
        return f"{self.source}, {self.unit} {index + self.first}"


def load_rows(
    source: str | os.PathLike | datasets.Dataset | pandas.DataFrame | Iterable[Mapping],
    *,
    split: str = "train",
    name: str = "candidates",
) -> Rows:
    """Rows of `source`, all of them in memory.

    `source` is a path to a .jsonl (.json-lines) or .parquet file, a directory written by
    `datasets.save_to_disk`, the name of a dataset on the hub, a Dataset or DatasetDict, a pandas
    DataFrame, or an iterable of dicts. `split` selects from a DatasetDict and from the hub. `name` is
    how errors call rows that come from memory. `Rows` are returned as they are. In structs of tables
    (messages, tools) fields without a value are left out, as they are in JSONL.

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
    path = Path(source)
    if os.path.isdir(path):
        return _from_saved(path, split)
    known = path.suffix in JSONL_SUFFIXES + PARQUET_SUFFIXES
    if os.path.exists(path):
        if not known:
            raise DataError(f"{path}: expected {SUPPORTED}, got the extension {path.suffix!r}")
        reader = _from_jsonl if path.suffix in JSONL_SUFFIXES else _from_parquet
        try:
            return reader(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({one_line(error)}); check the file") from error
    # Names on the hub look like "owner/name"; anything else is a mistyped path, and asking the hub for
    # it would hide that.
    if known or isinstance(source, os.PathLike) or source.startswith((".", "/")) or source.count("/") > 1:
        raise DataError(f"{path}: no such file; expected {SUPPORTED}, or the name of a dataset on the hub")
    return _from_hub(source, split)


def _from_jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        rows = [_parse_line(raw, f"{path.name}, line {number}") for number, raw in enumerate(file, start=1)]
    return Rows(rows, source=path.name, unit="line", first=1)


def _parse_line(raw: bytes, where: str) -> dict:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, byte {error.start} of the line is {raw[error.start]:#04x}; "
            f"convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{where}: expected a JSON object, the line is empty; remove the line")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected one JSON object per line, got malformed JSON ({one_line(error)})"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _from_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: expected a Parquet file ({one_line(error)})") from error
    return _from_table(table.to_pylist(), path.name)


def _from_saved(path: Path, split: str) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a directory written by datasets.save_to_disk ({one_line(error)})") from error
    return _from_dataset(saved, split, path.name)


def _from_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    # The hub client, the HTTP stack and the dataset builders each raise errors of their own families,
    # which share no base but Exception; the original stays attached as the cause.
    except Exception as error:
        raise DataError(
            f"{name!r}: expected {SUPPORTED}, or the name of a dataset on the hub; there is no such path and "
            f"loading split {split!r} from the hub failed ({type(error).__name__}: {one_line(error)})"
        ) from error
    return _from_dataset(loaded, split, name)


def _from_dataset(loaded: datasets.Dataset | datasets.DatasetDict, split: str, source: str) -> Rows:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{source}: expected a split {split!r}, got the splits {', '.join(loaded)}; pass split=")
        loaded = loaded[split]
    return _from_table(loaded.to_list(), source)


def _from_memory(source: object, split: str, name: str) -> Rows:
    import datasets
    import pandas

    if isinstance(source, datasets.Dataset | datasets.DatasetDict):
        return _from_dataset(source, split, name)
    if isinstance(source, pandas.DataFrame):
        return _from_table(list(_records(source)), name)
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise ArgumentError(
            f"{name}: expected a path, the name of a dataset, a Dataset, a DataFrame or an iterable of "
            f"dicts, got {type(source).__name__}"
        )
    rows = []
    for index, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {index}: expected a dict, got {type(row).__name__}")
        rows.append(dict(row))
    return Rows(rows, source=name)


def _from_table(rows: list[dict], source: str) -> Rows:
    return Rows([{column: _without_fillers(value) for column, value in row.items()} for row in rows], source=source)


def _without_fillers(value: Any) -> Any:
    """The value without the fields of structs that are None: a table writes them where other rows have a value."""
    if isinstance(value, dict):
        return {key: _without_fillers(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_fillers(entry) for entry in value]
    return value


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


# What the columns of a row say.


@dataclass(frozen=True)
class Chat:
    """A conversation of checked messages, dicts with `role` and `content`, or `tool_calls` of the assistant.

    The assistant's turns from message `first_labelled` on are labelled. `where` is the address of the row
    for errors, `index` its number. `variables` are what the row tells its chat template besides.
    """

    index: int
    where: str
    messages: list[dict]
    first_labelled: int = 0
    variables: Mapping[str, Any] = field(default_factory=dict)


def column_set(row: object, where: str) -> tuple[str, ...]:
    """The first of COLUMN_SETS that the row at the address `where` holds; DataError if it holds none."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a dict of columns, got {type(row).__name__}")
    # A table of mixed rows holds None in the columns that a row does not use, so filled columns come
    # first; a set whose value is None is still the best address for the error.
    for present in ({key for key in row if row[key] is not None}, set(row)):
        for columns in COLUMN_SETS:
            if present.issuperset(columns):
                return columns
    expected = " or ".join(" + ".join(columns) for columns in COLUMN_SETS)
    raise DataError(f"{where}: expected the columns {expected}, got {', '.join(map(str, row)) or 'none'}")


def read_chat(row: Mapping, columns: tuple[str, ...], index: int, where: str) -> Chat:
    """The conversation in `columns`, one of COLUMN_SETS but not the token ids; DataError if malformed.

    `chat_template_kwargs` and, of messages, `tools` are read from the columns of these names, as TRL does.
    """
    variables = check_template_kwargs(row.get("chat_template_kwargs"), f"{where}: chat_template_kwargs: ")
    if columns == ("messages",):
        messages = _messages(row, "messages", where, needs_answer=True)
        return Chat(index, where, messages, 0, variables | _tools(row, where))
    question, answer = columns
    if question == "prompt" and (isinstance(row[question], list) or isinstance(row[answer], list)):
        prompt = _messages(row, question, where, needs_answer=False)
        messages = prompt + _messages(row, answer, where, needs_answer=True)
        return Chat(index, where, messages, len(prompt), variables | _tools(row, where))
    user = _text(row, question, where)
    if question == "instruction" and row.get("input") is not None and _text(row, "input", where).strip():
        user = f"{user}\n\n{row['input']}"
    reply = _text(row, answer, where)
    if not reply.strip():
        raise DataError(f"{where}: expected a non-empty text in column {answer}, got {short(reply)}")
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return Chat(index, where, messages, 0, variables)


def check_template_kwargs(value: object, where: str = "") -> dict[str, Any]:
    """What a chat template is told by name, such as {"enable_thinking": False}; nothing for None.

    Names without a value are left out: a table of mixed rows holds None in the fields that a row does not
    use. Raises DataError, which begins with `where`.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{where}expected names and values, such as {{'enable_thinking': False}}, got {short(value)}")
    taken = sorted(_RENDERING & value.keys())
    if taken:
        raise DataError(f"{where}{taken[0]} is not a variable of the template: remove it")
    return {name: entry for name, entry in value.items() if entry is not None}


def _tools(row: Mapping, where: str) -> dict[str, Any]:
    """The functions that the template describes to the model: a list of JSON schemas, or its JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected JSON in column tools ({one_line(error)})") from error
    if not tools or isinstance(tools, str):
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: expected a list of JSON schemas in column tools, got {short(tools)}")
    return {"tools": tools}


def _text(row: Mapping, column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise DataError(f"{where}: expected a text in column {column}, got {short(row[column])}")
    _check_unicode(row[column], f"{where}: column {column}")
    return row[column]


def _messages(row: Mapping, column: str, where: str, needs_answer: bool) -> list[dict]:
    messages = row[column]
    if not isinstance(messages, list):
        raise DataError(f"{where}: expected a list of messages in column {column}, got {short(messages)}")
    for number, message in enumerate(messages):
        _check_message(message, f"{where}: message {number} of column {column}")
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: expected a message of the assistant in column {column}, got none")
    return messages


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where}: expected a dict with role and content, got {short(message)}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: expected a role of {', '.join(ROLES)}, got {short(role)}")
    calls = called_functions(message, where) if role == "assistant" else []
    if calls and content is None:
        return
    if "content" not in message:
        raise DataError(f"{where}: expected a dict with role and content, got {short(message)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: expected a text as content, got {short(content)}")
    _check_unicode(content, where)
    if role == "assistant" and not calls and not content.strip():
        raise DataError(f"{where}: expected a non-empty answer of the assistant, got {short(content)}")


def called_functions(message: Mapping[str, Any], where: str) -> list[str]:
    """Names of the functions in the `tool_calls` of a message, in order; DataError for a call without a name."""
    names = []
    calls = message.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: expected tool_calls, each with the name of a function, got {short(call)}")
        names.append(name)
    return names


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair, a character cut in two; remove it"
        ) from error


def one_line(error: BaseException) -> str:
    """The message of an error of another library, fit to stand inside one of ours."""
    return " ".join(str(error).split())


def short(value: object) -> str:
    """A value of a row, fit to stand inside an error."""
    return " ".join(reprlib.repr(value).split())
