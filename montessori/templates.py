"""Chat templates: which one is meant, and what a conversation reads like through it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from montessori.columns import check_template_kwargs
from montessori.errors import ArgumentError, DataError
from montessori.messages import FUNCTION_ROLES, ROLES, joined
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
# What a template may fail with on a conversation that it does not take.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError)
# Of letters and digits, which pass every filter of a template; no template has a text of its own that holds these.
_PROBES = {role: f"montessori7c1e59{role}probe" for role in ROLES}
_TURNS = ("user", "assistant")


@dataclass(frozen=True)
class Template:
    """A Jinja template with the tokenizer that renders it, and the variables it is always given.

    Templates of models for images and text may loop over the parts of a content, and then write nothing of one
    that is a text. Which they want is found out by rendering both, once for each role, and what they are given
    is changed into that. A template that writes both is given texts.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    variables: Mapping[str, Any]
    # By role; None where the template does not write it.
    _wants_parts: dict[str, bool | None] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        given = [self._as_wanted(message, where) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(given, chat_template=self.source, **told, **options)
        except _FAILURES as error:
            raise DataError(f"{where}: the chat template fails on it ({one_line(error)})") from error

    def text(
        self, messages: list[dict[str, Any]], where: str, variables: Mapping[str, Any] | None = None, **options: Any
    ) -> str:
        return self.apply(messages, where, variables, tokenize=False, **options)

    def _as_wanted(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        role, content = message["role"], message.get("content")
        if content is None:
            return message
        if role not in self._wants_parts:
            in_parts = self._roles_in_parts(role)
            # Most templates pass over names that they do not know, without a word.
            known = role not in FUNCTION_ROLES[1:] or _PROBES[role] in self._probed((*_TURNS, role), in_parts)
            self._wants_parts[role] = role in in_parts if known else None
        wants_parts = self._wants_parts[role]
        if wants_parts is None:
            raise DataError(
                f"{where}: the chat template writes no message of the role {role}; write what a function returned as "
                f"tool, if the template knows that"
            )
        return {**message, "content": _in_parts(content) if wants_parts else joined(content)}

    def _roles_in_parts(self, role: str) -> frozenset[str]:
        """Of the user, the assistant and `role` those whose content it writes only in parts."""
        turns = self._turns_in_parts
        if role in _TURNS:
            return turns
        with_role = turns | {role}
        roles = (*_TURNS, role) if role in FUNCTION_ROLES else (role, *_TURNS)
        return self._first_written(roles, [with_role, turns] if turns else [turns, with_role])

    @cached_property
    def _turns_in_parts(self) -> frozenset[str]:
        return self._first_written(_TURNS, [frozenset(), *map(frozenset, (_TURNS, _TURNS[:1], _TURNS[1:]))])

    def _first_written(self, roles: Sequence[str], choices: Sequence[frozenset[str]]) -> frozenset[str]:
        """The first choice of roles in parts with which the contents of all `roles` are written, else the first."""
        return next((choice for choice in choices if self._writes(roles, choice)), choices[0])

    def _writes(self, roles: Sequence[str], in_parts: frozenset[str]) -> bool:
        text = self._probed(roles, in_parts)
        # In quotation marks it stands where a list of parts is written as it is.
        return all(re.search(f"(?<!['\"]){_PROBES[role]}", text) for role in roles)

    def _probed(self, roles: Sequence[str], in_parts: frozenset[str]) -> str:
        """The text of a message of each of the `roles`, empty where the template fails on them."""
        messages: list[dict[str, Any]] = [
            {"role": role, "content": _in_parts(_PROBES[role]) if role in in_parts else _PROBES[role]} for role in roles
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, **self.variables
            )
        except _FAILURES:
            return ""
        return str(text)


def _in_parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


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
        return ("{{ bos_token }}" if beginning(tokenizer) else "") + BUILT_IN_TEMPLATES[chat_template]
    if chat_template == NO_TEMPLATE:
        raise ArgumentError(
            "chat_template='none': expected a template, since a conversation is rendered here; none serves the "
            "encoding of texts alone"
        )
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    if chat_template.endswith(".jinja"):
        try:
            return Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template={chat_template!r}: cannot be read ({one_line(error)})") from error
    raise ArgumentError(
        f"chat_template={short(chat_template)}: expected {', '.join(BUILT_IN_TEMPLATES)}, a Jinja template, a "
        f"path to a .jinja file, or none for texts as they stand"
    )


def beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """The bos_token where the tokenizer starts every text with it: the model has seen no text without."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""
