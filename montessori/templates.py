"""Chat templates: which one is meant, and what a conversation reads like through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from montessori.data import check_template_kwargs
from montessori.errors import ArgumentError, DataError
from montessori.wording import one_line, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In the place of a template: texts as they stand.
NO_TEMPLATE = "none"
BUILT_IN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{{ message['content'] + (eos_token if message['role'] == 'assistant' else '\n') }}"
        "{% endfor %}"
    ),
}


@dataclass(frozen=True)
class Template:
    """A Jinja template with the tokenizer that renders it, and the variables it is always given."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    variables: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Template:
        """Arguments and errors as in `encode_rows`."""
        try:
            variables = check_template_kwargs(chat_template_kwargs)
        except DataError as error:
            raise ArgumentError(f"chat_template_kwargs: {error}") from error
        return cls(tokenizer, resolve_template(tokenizer, chat_template), variables)

    def apply(
        self, messages: list[dict[str, Any]], where: str, variables: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """`apply_chat_template` of the tokenizer; its errors become a DataError that begins with `where`.

        `variables` go over those that the template is always given.
        """
        told = {**self.variables, **(variables or {})}
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.source, **told, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the chat template fails on it ({one_line(error)})") from error

    def text(
        self, messages: list[dict[str, Any]], where: str, variables: Mapping[str, Any] | None = None, **options: Any
    ) -> str:
        return self.apply(messages, where, variables, tokenize=False, **options)


def resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The Jinja source that `chat_template` means (see `encode_rows`); DataError or ArgumentError if none."""
    if chat_template is None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; set chat_template (--chat-template) to plain (for base "
                "models), chatml, a Jinja template, a path to a .jinja file, or none for texts as they stand"
            )
        return tokenizer.get_chat_template()
    if not isinstance(chat_template, str):
        raise ArgumentError(f"chat_template: expected a str, got {type(chat_template).__name__}")
    if chat_template in BUILT_IN_TEMPLATES:
        if chat_template == "plain" and tokenizer.eos_token is None:
            raise DataError("chat_template='plain': expected a tokenizer with an eos_token, got None; set one")
        return _beginning(tokenizer) + BUILT_IN_TEMPLATES[chat_template]
    if chat_template == NO_TEMPLATE:
        raise ArgumentError(
            "chat_template='none': expected a template, since a conversation is rendered here; none serves the "
            "encoding of texts alone"
        )
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    if chat_template.endswith(".jinja"):
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template={chat_template!r}: cannot be read ({one_line(error)})") from error
    raise ArgumentError(
        f"chat_template={short(chat_template)}: expected {', '.join(BUILT_IN_TEMPLATES)}, a Jinja template, a "
        f"path to a .jinja file, or none for texts as they stand"
    )


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """The bos_token where the tokenizer starts every text with it: the model has seen no text without."""
    bos = tokenizer.bos_token_id
    return "{{ bos_token }}" if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""
