"""What the teacher reads, and how an instruction is found in what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from montessori.columns import column_set, read_chat, read_question
from montessori.errors import DataError
from montessori.files import Rows
from montessori.messages import joined
from montessori.templates import Template, beginning

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
    """The instruction of every row of a seed, reference or evaluation set, with its input where it has one.

    Rows need no answer. Raises DataError, naming file and line.
    """
    return [_instruction(row, index, rows.where(index)) for index, row in enumerate(rows)]


def _instruction(row: Mapping[str, Any], index: int, where: str) -> str:
    if isinstance(row.get("instruction"), str) and "messages" not in row:
        return read_question(row, "instruction", where)
    columns = column_set(row, where)
    if "input_ids" in columns:
        raise DataError(f"{where}: expected text, got token ids")
    messages = read_chat(row, columns, index, where, needs_answer=False).messages
    asked = [joined(message["content"]) for message in messages if message["role"] == "user"]
    if not asked:
        raise DataError(f"{where}: expected a message of the user, got none")
    return asked[0]


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
