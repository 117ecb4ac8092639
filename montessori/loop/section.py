"""Base of every group of settings: typed, frozen, and with errors for people."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from typing_extensions import Self

from montessori.columns import check_template_kwargs
from montessori.errors import ArgumentError, DataError


class Section(BaseModel):
    """A group of settings. Unknown keys and wrong types are errors; nothing is converted but int to float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """The section that plain `values` (of YAML or JSON) describe; `where` is how errors call their source.

        Raises ArgumentError: the path of the first wrong key, what was expected and what came.
        """
        try:
            # JSON mode takes a list for a tuple, which is all that YAML can write.
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise ArgumentError(f"{where}: {_describe(cls, error)}") from None
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{where}: expected plain values ({error})") from None


class ChatSection(Section):
    """Settings of what reads or writes chats; both as in `encode_rows`."""

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            return check_template_kwargs(value)
        except DataError as error:
            raise ValueError(str(error)) from error

    @property
    def chat(self) -> dict[str, Any]:
        """Both, as arguments."""
        return {"chat_template": self.chat_template, "chat_template_kwargs": self.chat_template_kwargs}


def _describe(section: type[Section], error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path) or "settings"
    if first["type"] == "extra_forbidden":
        known = _keys(section, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    if first["type"] == "missing":
        return f"{key}: expected a value, none was given"
    if first["type"] == "value_error":
        # A validator of ours: its message says what to do.
        text = str(first["ctx"]["error"])
        return f"{key}: {text}" if path else text
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _keys(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = section.model_fields.get(part)
        nested = _section_in(field.annotation) if field is not None else None
        if nested is None:
            break
        section = nested
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _section_in(argument)) is not None:
            return found
    return None
