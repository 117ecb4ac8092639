"""Several processes of one run, started by torchrun: who writes, who waits, and what they tell each other.

A single process is rank 0 of 1, for which nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from montessori.errors import ArgumentError, ResourceError
from montessori.wording import one_line

T = TypeVar("T")

# A stage that one process does alone may take hours while the others wait.
_TIMEOUT = timedelta(days=2)


def start_processes() -> None:
    """Join the processes that torchrun has started; safe to call again and in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    if _several():
        dist.barrier()


def from_main(value: Any) -> Any:
    """The value that the first process passed."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """What every process passed, in order of rank."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_do(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every process, in order of rank. Where it fails on one, that one raises its error, and the
    others ResourceError instead of waiting for it."""
    if not _several():
        return [work()]
    mine: T | None = None
    failure: Exception | None = None
    try:
        mine = work()
    except Exception as error:
        failure = error
    told = from_all((mine, failure and f"{type(failure).__name__}: {one_line(failure)}"))
    if failure is not None:
        raise failure
    for other, (_, why) in enumerate(told):
        if why is not None:
            raise ResourceError(f"process {other} failed ({why})")
    return [done for done, _ in told]


def main_does(work: Callable[[], T]) -> T:
    """What `work` gives on the first process. Where it fails there, the others raise ResourceError."""
    return cast(T, all_do(work if is_main() else lambda: None)[0])


def check_same(own: Mapping[str, str]) -> None:
    """Raise ArgumentError, on every process that differs from another, unless all passed the same values."""
    for other, values in enumerate(from_all(dict(own))):
        differing = [name for name in own if own[name] != values[name]]
        if differing:
            raise ArgumentError(
                f"distributed=True: expected the same on every process, got {', '.join(differing)} on process {rank()} "
                f"that differ from those on process {other}; give every process the same, each scores its share"
            )


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
