"""Happens-before among warps: whether barriers order all accesses to shared memory, whatever the schedule.

Every warp has a vector clock; barriers join them. A bulk copy is an actor of its own for each barrier that it counts
on. Two accesses of the same two bytes, of which one writes, must be ordered by clocks.
"""

from __future__ import annotations

import numpy as np

from .memory import FaultError

GRAIN = 2  # bytes that are told apart


class Clocks:
    """Vector clocks of the actors of a cluster: its warps, and the barriers by whose name bulk copies write."""

    def __init__(self, warps: int, barriers: int):
        self.now = np.empty((warps + barriers, warps + barriers), np.int32)
        self.warps = warps

    def reset(self) -> None:
        self.now.fill(0)
        np.fill_diagonal(self.now, 1)
        self._actors: dict[tuple[int, int], int] = {}

    def copier(self, rank: int, barrier: int) -> int:
        return self._actors.setdefault((rank, barrier), self.warps + len(self._actors))

    def release(self, actors: np.ndarray) -> np.ndarray:
        """What whoever sees this has seen; the actors' later accesses are not in it."""
        seen = self.now[actors].max(0)
        self.now[actors, actors] += 1
        return seen

    def acquire(self, actors: np.ndarray, seen: np.ndarray) -> None:
        self.now[actors] = np.maximum(self.now[actors], seen)


class Shadow:
    """Who last wrote and read each two bytes of a block's shared memory; `generic` where no bulk copy or fence has made
    a write visible to the tensor cores."""

    def __init__(self, size: int, first_warp: int, warps: int, clocks: Clocks):
        grains = size // GRAIN
        self.clocks, self.first_warp = clocks, first_warp
        self.writer = np.zeros(grains, np.int32)
        self.written = np.zeros(grains, np.int32)
        self.read = np.zeros((grains, warps), np.int32)
        self.generic = np.zeros(grains, bool)

    def check_read(self, grains: np.ndarray, actors: np.ndarray) -> None:
        """`grains` [..., n] read by `actors` [n]."""
        if (self.clocks.now[actors, self.writer[grains]] < self.written[grains]).any():
            raise FaultError("reads shared memory that another warp may not have written yet")

    def check_write(self, grains: np.ndarray, actors: np.ndarray, same: np.ndarray | bool = False) -> None:
        """`same` [n]: what is written is there already, as where several warps hold the same values."""
        if ((self.clocks.now[actors, self.writer[grains]] < self.written[grains]) & ~np.asarray(same)).any():
            raise FaultError("writes shared memory that another warp may write at the same time")
        last = self.first_warp + np.arange(self.read.shape[1])
        if (self.clocks.now[actors[..., None], last] < self.read[grains]).any():
            raise FaultError("writes shared memory that another warp may still be reading")

    def note_read(self, grains: np.ndarray, actors: np.ndarray) -> None:
        self.read[grains, actors - self.first_warp] = self.clocks.now[actors, actors]

    def note_write(self, grains: np.ndarray, actors: np.ndarray, generic: bool) -> None:
        self.writer[grains] = actors
        self.written[grains] = self.clocks.now[actors, actors]
        self.generic[grains] = generic

    def fence(self, actors: np.ndarray) -> None:
        """Writes that one of `actors` has seen are visible to the tensor cores from here on."""
        dirty = np.flatnonzero(self.generic)
        seen = (self.clocks.now[actors[:, None], self.writer[dirty]] >= self.written[dirty]).any(0)
        self.generic[dirty[seen]] = False

    def check_visible(self, grains: np.ndarray) -> None:
        if self.generic[grains].any():
            raise FaultError("a product reads what was stored without a fence for the tensor cores")


class NoShadow:
    """Where no races are searched for."""

    def __init__(self, *_: object): ...

    def nothing(self, *_: object, **__: object) -> None: ...

    check_read = check_write = note_read = note_write = fence = check_visible = nothing
