"""Messages of a conversation, checked, in the form that chat templates take: `role` and `content`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy

from montessori.errors import DataError
from montessori.files import without_fillers
from montessori.wording import short

# What a function returned, as most templates call it; others have names of their own (Llama 3, OLMo, OpenAI, GLM-4).
FUNCTION_ROLES = ("tool", "ipython", "environment", "function", "observation")
ROLES = ("system", "developer", "user", "assistant", *FUNCTION_ROLES)
# What ShareGPT writes in `from`.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    **{role: role for role in ROLES},
    "function": "tool",
    "observation": "tool",
}


# By which a message says whether it enters the loss: OpenAI, ms-swift and AgentInstruct, Axolotl.
LABEL_KEYS = ("weight", "loss", "train", "training")
_SPANS = "label parts of a message by giving input_ids and labels, or remove it"
# What would change the text or its labels, and how to say it otherwise.
UNREAD_KEYS = {
    "function_call": "write it as tool_calls",
    "train_detail": _SPANS,
    "training_detail": _SPANS,
}


def read_messages(messages: object, column: str, where: str, needs_answer: bool) -> list[dict[str, Any]]:
    """The messages in `column` of the row at the address `where`, each with `role` and `content`.

    ShareGPT's `from` and `value` become `role` and `content`; texts alone, as LIMA has them, are of the user and the
    assistant in turn. The JSON text of a list of objects is that list. A content is a text, or a list of parts, each
    of `type` "text" and `text` and nothing else.
    Raises DataError for anything else, and for no message of the assistant where one is needed.
    """
    if isinstance(messages, str):
        messages = _from_json(messages)
    if not isinstance(messages, list):
        raise DataError(
            f"{where}: expected a list of messages in column {column}, or its JSON text, got {short(messages)}"
        )
    if messages and all(isinstance(message, str) for message in messages):
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    read = [
        _read_message(message, f"{where}: message {number} of column {column}")
        for number, message in enumerate(messages)
    ]
    if needs_answer and not any(message["role"] == "assistant" for message in read):
        raise DataError(f"{where}: expected a message of the assistant in column {column}, got none")
    return read


def _from_json(text: str) -> object:
    """The list of objects that a cell of a CSV file holds as JSON; any other text as it is."""
    with suppress(ValueError, RecursionError):
        messages = json.loads(text)
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return messages
    return text


def _read_message(message: object, where: str) -> dict[str, Any]:
    if isinstance(message, dict) and "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where}: expected a dict with role and content, got {short(message)}")
    message = {
        key: without_fillers(value) for key, value in message.items() if key in ("role", "content") or value is not None
    }
    check_unicode(message, where)
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: expected a role of {', '.join(ROLES)}, got {short(role)}")
    for key in UNREAD_KEYS:
        if message.get(key):
            raise DataError(f"{where}: {key} is not read; {UNREAD_KEYS[key]}")
    if role == "assistant":
        _check_labels(message, where)
    calls = called_functions(message, where) if role == "assistant" else []
    if calls and content is None:
        return message
    if "content" not in message:
        raise DataError(f"{where}: expected a dict with role and content, got {short(message)}")
    if isinstance(content, list):
        content = _parts(content, where)
        message = {**message, "content": content}
    elif not isinstance(content, str):
        raise DataError(f"{where}: expected a text as content, got {short(content)}")
    text = joined(content)
    if role == "assistant" and not calls and not text.strip():
        raise DataError(f"{where}: expected a non-empty answer of the assistant, got {short(content)}")
    return message


def _from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise DataError(f"{where}: expected from to be one of {', '.join(SPEAKERS)}, got {short(speaker)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    said = {"content": message["value"]} if "value" in message else {}
    return {"role": SPEAKERS[speaker], **said, **others}


def _parts(parts: list[Any], where: str) -> list[dict[str, str]]:
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: expected a text as content, or parts such as {{'type': 'text', 'text': 'Hi'}}, got "
                f"{short(part)}"
            )
    # Templates ask whether a part has an image, which a table may hold as None beside every text.
    return [{"type": "text", "text": part["text"]} for part in parts]


def joined(content: str | list[dict[str, str]], separator: str = "") -> str:
    """The text of a content, whether it is one or is in parts."""
    return content if isinstance(content, str) else separator.join(part["text"] for part in content)


def labelled_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the assistant's messages, but for those that say (LABEL_KEYS) that they are not trained.

    Of others it says nothing: only what the assistant writes has labels.
    """
    return [
        turn
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and all(_label_values(message).values())
    ]


def _label_values(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in LABEL_KEYS if message.get(key) is not None}


def _check_labels(message: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a weight between 0 and 1, or for what is none."""
    for key, value in _label_values(message).items():
        if not isinstance(value, Real | numpy.bool_) or value not in (0, 1):
            raise DataError(
                f"{where}: expected {key} of 0 or 1 (false or true), got {short(value)}; the loss is the mean over "
                f"labelled tokens, a message is in it or not"
            )


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


def check_unicode(value: object, where: str) -> None:
    """Raise DataError for a text, or one in nested values, that holds half of a character, as a cut leaves it."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: character {error.start} is half of a surrogate pair, a character cut in two; remove it"
            ) from error
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            check_unicode(key, where)
            check_unicode(entry, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for entry in value:
            check_unicode(entry, where)
