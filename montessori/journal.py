"""Finished batches on disk as they finish, so that a killed run goes on and ends with the same bytes.

One JSON object per line: first the fingerprint of the run, then one record per finished batch. A line
cut short by a kill is dropped on the next start.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from montessori.errors import ResourceError, StateError


class ScoreJournal:
    """Append-only record of a scoring run at `path`; `records` holds what was finished before."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Start, or go on if the file belongs to the same run.

        Raises StateError naming what differs when it belongs to another run.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        lines, length = self._complete_lines()
        if not lines:
            self._truncate(0)
            self.append({"fingerprint": fingerprint})
            return
        header, *self.records = [json.loads(line) for line in lines]
        before = header.get("fingerprint", {})
        differing = sorted(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
        if differing:
            raise StateError(
                f"{self.path}: holds an unfinished run with other {', '.join(differing)}; "
                "repeat its command to go on, or delete the file to start anew"
            )
        self._truncate(length)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record and wait until it is on disk. Raises ResourceError when it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written ({error.strerror or error}); finished batches are kept there"
            ) from error

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _complete_lines(self) -> tuple[list[bytes], int]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        end = content.rfind(b"\n") + 1
        return content[:end].splitlines(), end

    def _truncate(self, length: int) -> None:
        if self.path.exists():
            os.truncate(self.path, length)
