"""What the output of a stage depends on, as plain values that say whether it would come out the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from montessori.fingerprint import content_digest

# Settings that name a file or folder if they end like this: its content counts, not where it lies.
_NAMED = {"chat_template": (".jinja",), "tasks": (".yaml", ".yml"), "opponent": ("",), "questions": ("",)}


def identity(name: str) -> str:
    """A digest of the local file or checkpoint `name`, or the name itself of what is elsewhere."""
    path = Path(name).expanduser()
    return content_digest(path) if path.exists() else name


def text_digest(content: Sequence[Any]) -> str:
    """SHA-256 of plain values, in order."""
    return hashlib.sha256(json.dumps(list(content), default=str).encode()).hexdigest()


def by_content(settings: Any, key: str = "") -> Any:
    """Plain `settings` with the digest of a file or folder in the place of its path; `key` is what names them."""
    if isinstance(settings, Mapping):
        return {key: by_content(value, key) for key, value in settings.items()}
    if isinstance(settings, list):
        return [by_content(value, key) for value in settings]
    return identity(settings) if isinstance(settings, str) and settings.endswith(_NAMED.get(key, ())) else settings
