"""Memory that a kernel can reach: arrays of the host at their own addresses, the launch's parameters, shared memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

# Where parameters lie among generic addresses; the block's rank in its cluster stands above the bits of an address in
# shared memory, as in the hardware's window.
PARAMETERS, RANK_BITS = 1 << 50, 24


class FaultError(Exception):
    """What a GPU would not have done, or not have been sure to do."""


class Region:
    """Bytes at an address."""

    def __init__(self, name: str, address: int, data: np.ndarray):
        self.name, self.address, self.data = name, address, data
        self._views: dict[Any, np.ndarray] = {}

    @property
    def end(self) -> int:
        return self.address + len(self.data)

    def view(self, kind: np.dtype) -> np.ndarray:
        if kind not in self._views:
            size = kind.itemsize
            self._views[kind] = self.data[: len(self.data) // size * size].view(kind)
        return self._views[kind]

    def index(self, addresses: np.ndarray, kind: np.dtype, count: int) -> np.ndarray:
        """[count, n] into `view(kind)` for `count` neighbours at each of [n] addresses."""
        size = kind.itemsize * count
        low, high = int(addresses.min()), int(addresses.max())
        if low < self.address or high + size > self.end:
            outside = low if low < self.address else high
            raise FaultError(f"{size} bytes at {outside:#x}, outside {self.name} [{self.address:#x}, {self.end:#x})")
        if (addresses % size).any():
            raise FaultError(f"an address in {self.name} that is not a multiple of the {size} bytes accessed")
        first = (addresses - self.address) // kind.itemsize
        return first + np.arange(count)[:, None]


class Memory:
    """Regions by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, name: str, address: int, size: int) -> None:
        """What the host holds at `address`."""
        if size:
            # From a multiple of 16 on, so that wide elements stand at whole places.
            before = address % 16
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (before + size)).from_address(address - before))
            self.regions.append(Region(name, address - before, data))

    def place(self, name: str, address: int, data: bytes) -> None:
        """A copy of `data`, in the place of what was there under this name."""
        self.regions = [region for region in self.regions if region.name != name]
        self.regions.append(Region(name, address, np.frombuffer(bytearray(data), np.uint8)))

    def region(self, address: int) -> Region:
        for region in self.regions:
            if region.address <= address < region.end:
                return region
        raise FaultError(f"address {address:#x}, where there is nothing")

    def load(self, addresses: np.ndarray, kind: np.dtype, count: int) -> np.ndarray:
        """[count, n] elements at [n] addresses, all in one region."""
        region = self.region(int(addresses[0]))
        return region.view(kind)[region.index(addresses, kind, count)]

    def load_bytes(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """[count, n]; an access of `count` bytes as a whole."""
        region = self.region(int(addresses[0]))
        region.index(addresses, np.dtype(f"V{count}"), 1)
        return region.data[addresses - region.address + np.arange(count)[:, None]]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        region = self.region(int(addresses[0]))
        region.view(values.dtype)[region.index(addresses, values.dtype, len(values))] = values
