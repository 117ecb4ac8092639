"""What all commands share: types of their options, and the progress bars of the libraries below them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from montessori.errors import ArgumentError
from montessori.wording import one_line


class OutputFile(click.Path):
    """Path of a file to write, whose name must end as the format of its content is called."""

    def __init__(self, suffix: str) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = _path(super().convert(value, param, ctx))
        if not path.name.lower().endswith(self.suffix):
            option = "" if param is None else f"--{param.name} "
            raise ArgumentError(f"{option}{path}: expected a name that ends in {self.suffix}, which is what is written")
        return path


class OutputFolder(click.Path):
    """Path of a folder to write in, which an empty name, as of an unset variable, is not."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not os.fspath(value):
            self.fail("expected a folder, got an empty name", param, ctx)
        return _path(super().convert(value, param, ctx))


def _path(value: Any) -> Path:
    # Of --out=~/x a shell leaves the ~ to us.
    return Path(os.fsdecode(value)).expanduser()


class JsonObject(click.ParamType):
    """A JSON object, or the dict that one became."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            read = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            self.fail(f"expected a JSON object ({one_line(error)})", param, ctx)
        if not isinstance(read, dict):
            self.fail(f"expected a JSON object, got {value!r}", param, ctx)
        return read


@contextmanager
def bars_of_libraries(shown: bool) -> Iterator[None]:
    """Their bars of loading, saving and building datasets are left as they are, or hidden within."""
    if shown:
        yield
        return
    import datasets
    from transformers.utils import logging

    loading, building = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if loading:
            logging.enable_progress_bar()
        if building:
            datasets.enable_progress_bars()
