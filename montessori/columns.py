"""What the columns of a row say: token ids, a conversation, or a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from montessori.errors import DataError
from montessori.files import without_fillers
from montessori.messages import check_unicode, joined, labelled_turns, read_messages
from montessori.wording import one_line, short

# Arguments of apply_chat_template that say how a text is rendered, not what the template is told.
_RENDERING = frozenset({
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
# In the order in which they are looked for: exact token ids win over the text they came from.
COLUMN_SETS = (
    ("input_ids", "labels"),
    ("input_ids", "completion_mask"),
    ("input_ids", "assistant_masks"),
    ("messages",),
    # Beside the first turn alone, in columns of other names.
    ("conversations",),
    ("conversation",),
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "response"),
    # What some have beside it as their answer is its last line.
    ("question", "solution"),
    ("question", "answer"),
    ("problem", "solution"),
)
# Not one of the sets: `text` beside them is often the same row, rendered, and elsewhere a name for many things.
TEXT_COLUMNS = ("text",)
# What stands beside a question, the first that has a text.
CONTEXT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
# A row in which one of these is filled is about more than its text.
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", "pixel_values", "input_features")


@dataclass(frozen=True)
class Chat:
    """A conversation of checked messages, dicts with `role` and `content`, or `tool_calls` of the assistant.

    `labelled` are the places of the assistant's turns that enter the loss. `where` is the address of the row
    for errors, `index` its number. `variables` are what the row tells its chat template besides.
    """

    index: int
    where: str
    messages: list[dict]
    labelled: tuple[int, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A text without a chat template: what is labelled in it, and the prompt before, None if nothing comes before."""

    index: int
    prompt: str | None
    labelled: str


def column_set(row: object, where: str) -> tuple[str, ...]:
    """The first of COLUMN_SETS that the row at the address `where` holds, else TEXT_COLUMNS.

    Raises DataError if there is none, and for a row with images, sound or video.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a dict of columns, got {type(row).__name__}")
    # One question for most rows, which have none of them.
    for column in () if row.keys().isdisjoint(MEDIA_COLUMNS) else MEDIA_COLUMNS:
        if _is_filled(row.get(column)):
            raise DataError(
                f"{where}: expected text alone, got column {column}; leave the row out, or remove the column if the "
                f"model does not see it"
            )
    # A table of mixed rows holds None in the columns that a row does not use, so filled columns come
    # first; a set of which a value is None is still the best address for the error.
    filled = {key for key, value in row.items() if value is not None and not (isinstance(value, str) and not value)}
    for columns in COLUMN_SETS:
        if filled.issuperset(columns):
            return columns
    for columns in COLUMN_SETS:
        if row.keys() >= {*columns} and ("text" not in filled or not filled.isdisjoint(columns)):
            return columns
    if "text" in row:
        return TEXT_COLUMNS
    expected = " or ".join(" + ".join(columns) for columns in (*COLUMN_SETS, TEXT_COLUMNS))
    raise DataError(f"{where}: expected the columns {expected}, got {', '.join(map(str, row)) or 'none'}")


def read_chat(row: Mapping, columns: tuple[str, ...], index: int, where: str, needs_answer: bool = True) -> Chat:
    """The conversation in `columns`, one of COLUMN_SETS but not the token ids; DataError if malformed.

    One column of messages may do without an answer where none is needed. What the system says and earlier turns
    are read from the columns `system` (or `system_prompt`) and, before a question, `history`; what the template
    is told besides from `chat_template_kwargs` and `tools`.
    """
    if columns == TEXT_COLUMNS:
        raise DataError(f"{where}: expected a conversation, got a text alone in column text")
    variables = check_template_kwargs(row.get("chat_template_kwargs"), f"{where}: chat_template_kwargs: ")
    variables |= _tools(row, columns, where)
    check_unicode(variables, where)
    first_labelled = 0
    if len(columns) == 1:
        messages = read_messages(row[columns[0]], columns[0], where, needs_answer)
    elif _holds_messages(row, columns):
        messages = read_messages(row[columns[0]], columns[0], where, needs_answer=False)
        first_labelled = len(messages)
        messages = messages + read_messages(row[columns[1]], columns[1], where, needs_answer=True)
    else:
        turns = [
            *read_history(row, where),
            (read_question(row, columns[0], where), _filled_text(row, columns[1], where)),
        ]
        pairs = [zip(("user", "assistant"), turn, strict=True) for turn in turns]
        messages = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    if len(columns) == 1 or _holds_messages(row, columns):
        _check_history(row, columns[0], messages, where)
    system = _system(row, messages, where)
    messages, first_labelled = [*system, *messages], first_labelled + len(system)
    labelled = tuple(turn for turn in labelled_turns(messages) if turn >= first_labelled)
    return Chat(index, where, messages, labelled, variables)


def read_text(row: Mapping, columns: tuple[str, ...], index: int, where: str) -> Text:
    """The texts in `columns`, TEXT_COLUMNS or one of COLUMN_SETS but not the token ids, as they stand.

    Raises DataError if they are malformed, or messages, which have no text without a chat template.
    """
    *questions, answer = columns
    if (not questions and columns != TEXT_COLUMNS) or _holds_messages(row, columns):
        raise DataError(
            f"{where}: chat_template='none' takes texts as they stand, got messages in column {columns[0]}; name a "
            f"chat template, or give prompt and completion as texts"
        )
    if not questions:
        return Text(index, None, _filled_text(row, answer, where))
    beside = [column for column in (*SYSTEM_COLUMNS, "history", "chat_template_kwargs") if _is_filled(row.get(column))]
    beside += _tools(row, columns, where)
    if beside:
        raise DataError(
            f"{where}: chat_template='none' has no place for column {beside[0]}; name a chat template, or write it "
            f"into {questions[0]} and remove the column"
        )
    return Text(index, read_question(row, questions[0], where), _filled_text(row, answer, where))


def _holds_messages(row: Mapping, columns: tuple[str, ...]) -> bool:
    return columns == ("prompt", "completion") and any(isinstance(row[column], list) for column in columns)


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


def _tools(row: Mapping, columns: tuple[str, ...], where: str) -> dict[str, Any]:
    """The functions that the template describes to the model: a list of JSON schemas, or its JSON text.

    Beside messages anything else is an error; beside texts it is a column of another meaning.
    """
    strict = len(columns) == 1 or _holds_messages(row, columns)
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            if not strict:
                return {}
            raise DataError(f"{where}: expected JSON in column tools ({one_line(error)})") from error
    if not isinstance(tools, Sized) or isinstance(tools, str) or not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        if not strict:
            return {}
        raise DataError(f"{where}: expected a list of JSON schemas in column tools, got {short(tools)}")
    return {"tools": without_fillers(tools)}


def read_question(row: Mapping, column: str, where: str) -> str:
    """The text in `column` and, after a blank line, what the row adds to an instruction or a question."""
    text = _text(row, column, where)
    context = _context_column(row, column)
    return text if context is None else f"{text}\n\n{_text(row, context, where)}"


def _context_column(row: Mapping, column: str) -> str | None:
    """The column that adds something to the question in `column`."""
    for context in CONTEXT_COLUMNS if column in ("instruction", "question") else ():
        value = row.get(context)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return context
    return None


def read_beside(row: Mapping, columns: tuple[str, ...]) -> set[str]:
    """The columns that `read_chat` looks into besides `columns`."""
    beside = {*SYSTEM_COLUMNS, "history", "chat_template_kwargs"}
    if len(columns) == 1 or _holds_messages(row, columns) or _tools(row, columns, ""):
        beside.add("tools")
    if context := _context_column(row, columns[0]):
        beside.add(context)
    return beside


def _system(row: Mapping, messages: list[dict], where: str) -> list[dict]:
    """What the columns of the system say, as a message to put before `messages`; none if those begin with it."""
    filled = [column for column in SYSTEM_COLUMNS if _is_filled(row.get(column))]
    if not filled:
        return []
    column = filled[0]
    for other in filled[1:]:
        if _text(row, other, where).strip() != _text(row, column, where).strip():
            raise DataError(
                f"{where}: expected one message of the system, got column {column} and another in column {other}; "
                f"remove one"
            )
    text = _text(row, column, where)
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}]
    if joined(messages[0]["content"]).strip() != text.strip():
        raise DataError(
            f"{where}: expected one message of the system, got column {column} and another in the first message; "
            f"remove one"
        )
    return []


def read_history(row: Mapping, where: str) -> list[tuple[str, str]]:
    """Earlier questions with their answers, as LLaMA-Factory has them beside an instruction."""
    history = row.get("history")
    if not _is_filled(history):
        return []
    if isinstance(history, str):
        # A cell of a CSV file.
        with suppress(ValueError, RecursionError):
            history = json.loads(history)
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise DataError(
            f"{where}: expected pairs of a question and its answer in column history, [['Hi', 'Hello']], got "
            f"{short(history)}"
        )
    columns = ("question", "answer")
    named = [dict(zip(columns, turn, strict=True)) for turn in history]
    places = [f"{where}: turn {number} of column history" for number in range(len(history))]
    return [
        (_text(turn, "question", place), _filled_text(turn, "answer", place))
        for turn, place in zip(named, places, strict=True)
    ]


def _check_history(row: Mapping, column: str, messages: list[dict], where: str) -> None:
    """Raise DataError for earlier turns beside the messages of `column`, unless those begin with them."""
    if not _is_filled(row.get("history")):
        return
    with suppress(DataError):
        earlier = [text for turn in read_history(row, where) for text in turn]
        turns = [message for message in messages if message["role"] in ("user", "assistant")]
        contents = [joined(message.get("content") or "") for message in turns]
        if contents[: len(earlier)] == earlier:
            return
    raise DataError(
        f"{where}: expected earlier turns in one place, got column history beside column {column}; write them into "
        f"{column}, and remove history"
    )


def _is_filled(value: object) -> bool:
    """Whether a cell holds anything: a table has None, blank text or structs of None where a row has nothing."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return any(_is_filled(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_is_filled(entry) for entry in value)
    if isinstance(value, Real):
        return bool(value)
    return value is not None and (not isinstance(value, Sized) or len(value) > 0)


def _filled_text(row: Mapping, column: str, where: str) -> str:
    text = _text(row, column, where)
    if not text.strip():
        raise DataError(f"{where}: expected a non-empty text in column {column}, got {short(text)}")
    return text


def _text(row: Mapping, column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise DataError(f"{where}: expected a text in column {column}, got {short(row[column])}")
    check_unicode(row[column], f"{where}: column {column}")
    return row[column]
