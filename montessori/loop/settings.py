"""A page of all settings of a run, made from the settings themselves: `montessori settings`, docs/settings.md."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from montessori.loop.config import PRESETS, Config, preset_values
from montessori.loop.section import ChatSection, Section

HEAD = """# Settings of a run

Written by `montessori settings`. A key is given as in YAML (`pairs: {rule: centred}`) or as
`--set pairs.rule=centred`; what a preset sets stands beside the default. Unknown keys and wrong types are errors.
Wherever there is a `chat_template`, it is a Jinja template, a path to a .jinja file, or chatml / plain / none, by
default the tokenizer's own; `chat_template_kwargs` are variables that it is given with every row ([data.md](data.md)).
"""
WIDTH = 120
WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true, false",
    dict: "keys and values",
}
_NOTHING = object()


@dataclass(frozen=True)
class _Setting:
    path: tuple[str, ...]
    field: FieldInfo
    default: Any

    @property
    def group(self) -> str:
        """Name of the section at the top that it is in, empty where it is in none."""
        return self.path[0] if len(self.path) > 1 or _section_of(self.field) else ""

    def row(self, presets: dict[str, dict[str, Any]]) -> str:
        value = "the keys below, or null" if _section_of(self.field) else _type_of(self.field.annotation)
        value += "".join(f", {bound}" for bound in _bounds(self.field))
        default = "to be given" if self.default is PydanticUndefined else _written(self.default)
        chosen = {name: _at(values, self.path) for name, values in presets.items()}
        given = ", ".join(f"{name}: {_written(value)}" for name, value in chosen.items() if value is not _NOTHING)
        return f"| `{'.'.join(self.path)}` | {value} | {default} | {given} |"


def settings_page() -> str:
    """Markdown: for each group of settings what they mean, and a table of keys, values, defaults and presets."""
    presets = {name: preset_values(name) for name in PRESETS}
    groups: dict[str, list[str]] = {}
    for setting in _settings(Config, ()):
        groups.setdefault(setting.group, []).append(setting.row(presets))
    told: set[type[Section]] = set()
    parts = [HEAD]
    for name, rows in groups.items():
        section = _section_of(Config.model_fields[name]) if name else None
        parts += [f"## {name}\n", *_meaning(section, told)] if section else _told_by(Config)
        parts += ["| key | value | default | presets |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _settings(section: type[Section], path: tuple[str, ...], given: Any = _NOTHING) -> Iterator[_Setting]:
    """Every setting in `section`; `given` are defaults that it has where it stands."""
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if given is not _NOTHING:
            default = getattr(given, name)
        nested = _section_of(field)
        if nested is None or default is None:
            yield _Setting((*path, name), field, default)
        if nested is not None:
            yield from _settings(nested, (*path, name), default if isinstance(default, Section) else _NOTHING)


def _meaning(section: type[Section], told: set[type[Section]]) -> list[str]:
    """What the docstrings of a section say, and those of the sections in it, of each of these once."""
    lines = _told_by(section)
    for name, field in section.model_fields.items():
        nested = _section_of(field)
        if nested is not None and nested not in told:
            told.add(nested)
            first, *rest = _meaning(nested, told)
            lines += [_filled(f"`{name}`. {first}"), *rest]
    return lines


def _told_by(section: type[Section]) -> list[str]:
    """Paragraphs of its docstring and of those that it builds on, each with an empty line after it."""
    kinds = [kind for kind in section.__mro__ if issubclass(kind, Section) and kind not in (Section, ChatSection)]
    paragraphs = "\n\n".join(kind.__doc__ or "" for kind in kinds).strip().split("\n\n")
    return [line for paragraph in paragraphs for line in (_filled(paragraph), "")]


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def _section_of(field: FieldInfo) -> type[Section] | None:
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type_of(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type_of(arguments[0])}"
    if origin is dict:
        return WORDS[dict]
    if NoneType in arguments:
        return " or ".join([*(_type_of(kind) for kind in arguments if kind is not NoneType), "null"])
    return WORDS[annotation]


def _bounds(field: FieldInfo) -> Iterator[str]:
    for bound in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if hasattr(bound, name):
                yield f"{sign} {getattr(bound, name)}"


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return _NOTHING
        values = values[part]
    return values


def _written(value: Any) -> str:
    """As in YAML, on one line; long lists by their beginning."""
    values = list(value) if isinstance(value, tuple) else value
    if isinstance(values, list) and len(values) > 4:
        return f"{_written(values[:3])} and {len(values) - 3} more"
    text = yaml.safe_dump(values, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return f"`{text}`"
