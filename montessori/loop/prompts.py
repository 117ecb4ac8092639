"""What the teacher reads, and how an instruction is found in what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from montessori.columns import column_set, read_chat, read_history, read_question
from montessori.errors import DataError
from montessori.files import Rows
from montessori.messages import joined
from montessori.templates import Template, beginning

_WORDS_ALONE = 8  # of a turn that says something without the ones before it
OPEN, CLOSE = "<instruction>", "</instruction>"

CHAT_REQUEST = (
    "Here are {count} instructions that people gave to a helpful text assistant:\n\n{examples}\n\n"
    "Write one new instruction for the same assistant. It must be clear, be about something that the examples do "
    "not cover, and carry with it every text or number that it needs, so that it can be answered in writing without "
    "a further question. First give the reason for your choice in one or two sentences. Then write the instruction, "
    f"and nothing else, between {OPEN} and {CLOSE}."
)
COMPLETION_HEADER = (
    "A list of varied instructions for a helpful text assistant. Each is clear and complete in itself, and no two "
    "are about the same thing.\n\n"
)


def plain(text: str) -> str:
    """What is the same in two texts that differ in case and in blanks alone."""
    return " ".join(text.casefold().split())


def instruction_text(rows: Rows) -> list[str]:
    """The instruction of every row of a seed, reference or evaluation set, with its input where it has one: the first
    turn of a conversation.

    Rows need no answer. Raises DataError, naming file and line.
    """
    return [turns[0] for turns in user_turns(rows)]


def user_turns(rows: Rows) -> list[list[str]]:
    """All that the user asks in every row; errors as `instruction_text`."""
    return [_asked(row, index, rows.where(index)) for index, row in enumerate(rows)]


class Asked:
    """What the user asks in some conversations, whatever its case and blanks."""

    def __init__(self, conversations: Iterable[Sequence[str]]) -> None:
        self._first: set[str] = set()
        self._later: set[str] = set()
        for turns in conversations:
            self._first.add(plain(turns[0]))
            self._later.update(map(plain, turns[1:]))

    def has_one_of(self, turns: Sequence[str]) -> bool:
        """Whether another conversation asks one of them too. Two later turns must say something alone: any two may go
        on with "Make it shorter, please"."""
        first, *later = map(plain, turns)
        return (
            first in self._first
            or first in self._later
            or any(text in self._first or (text in self._later and _says_something(text)) for text in later)
        )


def _says_something(text: str) -> bool:
    return len(text.split()) >= _WORDS_ALONE


def _asked(row: Mapping[str, Any], index: int, where: str) -> list[str]:
    if isinstance(row.get("instruction"), str) and "messages" not in row:
        return [read_question(row, "instruction", where), *(question for question, _ in read_history(row, where))]
    columns = column_set(row, where)
    if "input_ids" in columns:
        raise DataError(f"{where}: expected text, got token ids")
    messages = read_chat(row, columns, index, where, needs_answer=False).messages
    asked = [joined(message["content"]) for message in messages if message["role"] == "user"]
    if not asked:
        raise DataError(f"{where}: expected a message of the user, got none")
    return asked


def chat_prompt(tokenizer: Any, examples: Sequence[str], **chat: Any) -> str:
    """The request for one new instruction, as the teacher's chat template puts it."""
    listed = "\n".join(f"{OPEN}{example}{CLOSE}" for example in examples)
    return ask(tokenizer, CHAT_REQUEST.format(count=len(examples), examples=listed), **chat)


def completion_prompt(tokenizer: Any, examples: Sequence[str]) -> str:
    """A list of examples that ends where the next one begins."""
    listed = "".join(f"{OPEN}{example}{CLOSE}\n" for example in examples)
    return beginning(tokenizer) + COMPLETION_HEADER + listed + OPEN


def ask(tokenizer: Any, content: str, **chat: Any) -> str:
    """The text after which the assistant answers `content`. Raises DataError where there is no chat template.

    `chat`: chat_template and chat_template_kwargs of `encode_rows`.
    """
    return converse(tokenizer, [{"role": "user", "content": content}], **chat)


def converse(tokenizer: Any, messages: list[dict[str, str]], **chat: Any) -> str:
    """The text after which the assistant answers the last of `messages`; errors as `ask`."""
    return Template.of(tokenizer, **chat).text(messages, "a generated instruction", add_generation_prompt=True)


def find_instruction(completion: str, style: str) -> str | None:
    """What stands between the marks, without blanks around it; None where a mark is missing."""
    text, closed, _ = completion.partition(CLOSE)
    if not closed:
        return None
    if style == "chat":
        _, opened, text = text.rpartition(OPEN)
        if not opened:
            return None
    elif OPEN in text:
        return None
    return text.strip()


def opening_thought(prompt: str) -> str:
    """The mark with which a template has begun thoughts at the end of a prompt, if it has."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def outside_thoughts(response: str) -> str:
    """What a response says after its thoughts: nothing where they have no end."""
    _, ended, answer = response.rpartition("</think>")
    if ended:
        return answer
    return "" if response.lstrip().startswith("<think>") else response
