"""Files that are written whole or not at all: a reader, and a run that goes on, finds the old one or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from montessori.errors import DataError, ResourceError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there on leaving is brought to the disk and takes the place of `path`.

    Raises ResourceError when it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ResourceError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises DataError, naming the file, where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); redo the stage or the run that wrote it") from error


def write_json(path: Path, content: Any) -> None:
    """Sorted and indented. Raises ResourceError when it cannot be written."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], default: Callable[[Any], Any] | None = None) -> None:
    """One JSON object per line, in UTF-8; `default` makes something of values that JSON does not have. Raises
    ResourceError when it cannot be written."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=default)
            # Half a surrogate has no UTF-8.
            file.write((line if line.isascii() or _is_unicode(line) else json.dumps(row, default=default)) + "\n")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
