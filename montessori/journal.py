"""Finished batches on disk as they finish, so that a killed run goes on and ends with the same bytes.

One JSON object per line: first the fingerprint of the run, then one record per finished batch. A line
cut short by a kill is dropped on the next start.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from montessori.errors import ResourceError, StateError


class ScoreJournal:
    """Append-only record of a scoring run at `path`; `records` holds what was finished before.

    Locked from `open` to `close` or `remove`: one process writes at a time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []
        self._file: FileIO | None = None

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Start, or go on if the file belongs to the same run.

        Raises StateError naming what differs when it belongs to another run, when another process writes it, and when
        a line is damaged; ResourceError when it cannot be written.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        self.close()
        self._file = self._locked()
        try:
            self._read(fingerprint)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def opened(self, fingerprint: dict[str, Any]) -> Iterator[ScoreJournal]:
        """`open` for the length of the context."""
        self.open(fingerprint)
        try:
            yield self
        finally:
            self.close()

    def append(self, record: dict[str, Any]) -> None:
        """Add one record and wait until it is on disk. Raises ResourceError when it cannot be written."""
        if self._file is None:
            raise StateError(f"{self.path}: append() before open(): open it with the fingerprint of the run")
        try:
            left = json.dumps(record).encode() + b"\n"
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written ({error.strerror or error}); finished batches are kept there"
            ) from error

    def close(self) -> None:
        """Let another process or a later call go on with the file."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise ResourceError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def remove(self) -> None:
        """Delete the file. Raises StateError while another process writes it."""
        if self._file is None:
            self._file = self._locked()
        # First the file, then the lock: no one can take it over in between.
        self.path.unlink(missing_ok=True)
        self.close()

    def _locked(self) -> FileIO:
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a write that fails for want of space leaves nothing that closing would try again.
                file = self.path.open("a+b", buffering=0)
            except OSError as error:
                raise ResourceError(f"{self.path}: cannot be written ({error.strerror or error})") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise StateError(
                    f"{self.path}: another process writes it; wait for it, or choose another file (--out)"
                ) from None
            except OSError as error:
                file.close()
                raise ResourceError(f"{self.path}: cannot be locked ({error.strerror or error})") from error
            if os.fstat(file.fileno()).st_nlink:
                return file
            # The process that held it has finished and removed it.
            file.close()

    def _read(self, fingerprint: dict[str, Any]) -> None:
        lines, length = self._complete_lines()
        os.truncate(self.path, length)
        if not lines:
            self.records = []
            self.append({"fingerprint": fingerprint})
            return
        header, *self.records = [self._parse(line, number) for number, line in enumerate(lines, start=1)]
        before = header.get("fingerprint")
        if before is None:
            raise self._damaged(1)
        differing = sorted(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
        # A share of the batches follows from the number of processes, which is what the user has changed.
        if "number of processes" in differing:
            differing = [key for key in differing if key != "batches"]
        if differing:
            raise StateError(
                f"{self.path}: holds an unfinished run with other {', '.join(differing)}; "
                "repeat its command to go on, or delete the file (--fresh) to start anew"
            )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._damaged(number) from error
        if not isinstance(record, dict):
            raise self._damaged(number)
        return record

    def _damaged(self, number: int) -> StateError:
        return StateError(
            f"{self.path}, line {number}: is damaged, expected what a run writes; delete the file to start anew"
        )

    def _complete_lines(self) -> tuple[list[bytes], int]:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        end = content.rfind(b"\n") + 1
        return content[:end].splitlines(), end
