"""The directory of a run: who works in it, which stages are done, what they cost."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from montessori import processes
from montessori.errors import ArgumentError, ResourceError
from montessori.writing import read_json, write_json

DONE, INPUTS, COST, LOG = "DONE", "inputs.json", "cost.json", "log.txt"
REPORT_FILE = "report.html"
_DROPPED = ".dropped_"
_SECONDS_BETWEEN_COSTS = 10
LOGGER = logging.getLogger("montessori.loop")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Settings that say what the content of an input is.
_CONTENT_OF = {
    "reference": ": data.reference or data.reference_rows",
    "evaluation": ": data.evaluation or data.evaluation_rows",
    "held_out": ": data.reference, data.evaluation, or how many rows of them",
}


@dataclass
class Stage:
    """One stage in progress: write outputs to `path`, count work in `tokens` and `facts`.

    `tokens`: tokens generated, trained on or scored, for the table of costs. `facts`: further numbers kept
    with the cost, such as rows or pairs.
    """

    name: str
    path: Path
    digest: str
    done: bool
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class RunDirectory:
    """A run at `path`, locked while the context is open.

        with RunDirectory("runs/a") as run:
            with run.stage("round_1/pairs", {"settings": …, "scores": digest}) as stage:
                if not stage.done:
                    pairs.run(…, out=stage.path)

    Of several processes of one run the first locks and writes, the others wait for it at the end of a stage.

    Raises ArgumentError when another run works in it, ResourceError when it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __enter__(self) -> RunDirectory:
        if not processes.is_main():
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise ArgumentError(
                f"{self.path}: another run works in this directory; wait for it, or choose another --out"
            ) from None
        for dropped in self.path.glob(f"{_DROPPED}*"):
            shutil.rmtree(dropped)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def drop(self, name: str) -> None:
        """Delete the stage or round `name`, and the page and pictures that show it; a kill in the midst of it leaves
        nothing that looks finished."""
        path = self.path / name
        if processes.is_main() and path.exists():
            dropped = self.path / f"{_DROPPED}{name.replace('/', '_')}"
            shutil.rmtree(dropped, ignore_errors=True)
            os.rename(path, dropped)
            shutil.rmtree(dropped)
            for shown in (*self.path.glob(f"{name.partition('/')[0]}_*.png"), self.path / REPORT_FILE):
                shown.unlink(missing_ok=True)
        processes.wait_for_all()

    def rounds(self) -> list[Path]:
        """The folders of the rounds, in their order."""
        found = [path for path in self.path.glob("round_*") if re.fullmatch(r"round_\d+", path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("round_")))

    def is_done(self, name: str) -> bool:
        return self.exists(name) and (self.path / name / DONE).is_file()

    def exists(self, name: str) -> bool:
        """Whether the stage `name` has been started."""
        return (self.path / name / INPUTS).is_file()

    def check(self, name: str, inputs: Mapping[str, Any]) -> None:
        """Raise ArgumentError naming the inputs that differ from those that the stage `name` was made with."""
        if _has_output(self.path / name):
            _compare(self.path / name, _flatten(json.loads(json.dumps(inputs))))

    def digest(self, name: str) -> str:
        """Digest of all that the finished stage `name` was made from; an input of the stages after it."""
        if not self.is_done(name):
            raise ArgumentError(f"{self.path / name}: expected a finished stage; run it first")
        return read_json(self.path / name / DONE)["digest"]

    @contextmanager
    def stage(self, name: str, inputs: Mapping[str, Any]) -> Iterator[Stage]:
        """Work on the stage `name`, a path below the run; `inputs` is everything that its output depends on.

        `inputs` holds plain values and digests, never times or paths of the machine. Leaving the context
        without an error marks the stage DONE. A stage that was cut short keeps its files and is entered
        again, with other inputs if it had written nothing yet; a finished one has `done` set.

        Raises ArgumentError naming the inputs that differ from those of what is there.
        """
        path = self.path / name
        flat = _flatten(json.loads(json.dumps(inputs)))
        if processes.is_main():
            if _has_output(path):
                _compare(path, flat)
            else:
                write_json(path / INPUTS, flat)
        digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
        stage = Stage(name, path, digest, processes.from_main(self.is_done(name)))
        if stage.done:
            yield stage
            return
        if not processes.is_main():
            yield stage
            processes.wait_for_all()
            return
        with _log_to(path / LOG), _counting_cost(stage):
            LOGGER.info("%s: start", name)
            try:
                yield stage
            except BaseException as error:
                LOGGER.info("%s: stopped by %s: %s", name, type(error).__name__, error)
                raise
            LOGGER.info("%s: done", name)
        write_json(path / DONE, {"digest": digest})
        processes.wait_for_all()

    def costs(self) -> dict[str, dict[str, Any]]:
        """cost.json of every stage that has one, by stage name in order of first start."""
        found = {
            str(file.parent.relative_to(self.path)): read_json(file)
            for folder in self.rounds()
            for file in folder.glob(f"*/{COST}")
        }
        return dict(sorted(found.items(), key=lambda item: item[1]["started"]))


def _has_output(path: Path) -> bool:
    """Whether the stage at `path` was started and has written more than what every stage begins with."""
    first = (path / INPUTS, path / COST, path / LOG)
    return first[0].is_file() and any(file.is_file() and file not in first for file in path.rglob("*"))


def _compare(path: Path, flat: dict[str, Any]) -> None:
    before = read_json(path / INPUTS)
    changed = sorted(key for key in {*before, *flat} if before.get(key) != flat.get(key))
    if changed:
        key = changed[0]
        said = [before.get(key), flat.get(key)]
        values = f"{said[0]!r}, now {said[1]!r}"
        if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in said):
            values = f"other content{_CONTENT_OF.get(key, '')}"
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        stage = f"{path.parent.name}/{path.name}"
        raise ArgumentError(
            f"{path}: was made with another {key} ({values}){more}; "
            f"use the same, another --out, or redo it and what comes after it: montessori run --from {stage}"
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextmanager
def _counting_cost(stage: Stage) -> Iterator[None]:
    """Add the seconds within to the cost of the stage: on leaving, and every few on the way, as a kill leaves none."""
    file = stage.path / COST
    before = read_json(file) if file.exists() else {"started": time.time(), "seconds": 0.0}
    started = time.monotonic()
    left = threading.Event()

    def write() -> None:
        seconds = round(before["seconds"] + time.monotonic() - started, 3)
        write_json(file, {**before, "seconds": seconds, "tokens": stage.tokens, **stage.facts})

    def keep_writing() -> None:
        while not left.wait(_SECONDS_BETWEEN_COSTS):
            # What cannot be written now is said on leaving.
            with suppress(ResourceError):
                write()

    keeper = threading.Thread(target=keep_writing, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        left.set()
        keeper.join()
        write()


@contextmanager
def _log_to(file: Path) -> Iterator[None]:
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()
