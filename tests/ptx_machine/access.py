"""Loads and stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .instructions import KINDS, Mask, Step, addresses_of, count_of, destination, operation, parts_of, source
from .memory import RANK_BITS, FaultError
from .races import GRAIN
from .text import Instruction

if TYPE_CHECKING:
    from .machine import Unit


def own_shared(unit: Unit, addresses: np.ndarray) -> np.ndarray:
    """Addresses in the block's own shared memory, whether given by the block's window or the cluster's."""
    ranks = addresses >> RANK_BITS
    if ((ranks != 0) & (ranks != unit.block.rank + 1)).any():
        raise FaultError("an ordinary access to another block's shared memory")
    return addresses & ((1 << RANK_BITS) - 1)


def grains(addresses: np.ndarray, size: int) -> np.ndarray:
    """[size in grains, n] of accesses of `size` bytes at `addresses` [n]."""
    return addresses // GRAIN + np.arange(max(1, size // GRAIN)).reshape(-1, *[1] * addresses.ndim)


def actors(unit: Unit, mask: Mask) -> np.ndarray:
    return unit.actors if mask is None else unit.actors[mask]


def load_shared(unit: Unit, addresses: np.ndarray, who: np.ndarray, kind: np.dtype, count: int) -> np.ndarray:
    """[count, n]"""
    index = unit.block.shared.index(addresses, kind, count)
    touched = grains(addresses, kind.itemsize * count)
    unit.block.shadow.check_read(touched, who)
    unit.block.shadow.note_read(touched, who)
    return unit.block.shared.view(kind)[index]


def store_shared(unit: Unit, addresses: np.ndarray, who: np.ndarray, values: np.ndarray) -> None:
    """`values` [count, n]"""
    index = unit.block.shared.index(addresses, values.dtype, len(values))
    touched = grains(addresses, values.dtype.itemsize * len(values))
    bits = np.dtype(f"u{values.dtype.itemsize}")
    memory, given = unit.block.shared.view(bits), np.ascontiguousarray(values).view(bits)
    unit.block.shadow.check_write(touched, who, (memory[index] == given).all(0))
    unit.block.shadow.note_write(touched, who, generic=True)
    memory[index] = given


@operation("ld")
def load(unit: Unit, instruction: Instruction) -> Step:
    kind, count = KINDS[instruction.opcode[-1].replace("bf16", "b16")], count_of(instruction.opcode)
    addresses = addresses_of(unit, instruction.operands[1])
    writes = [destination(unit, part) for part in parts_of(instruction.operands[0])]
    shared = any(word.startswith("shared") for word in instruction.opcode)

    def step(mask: Mask) -> None:
        at = addresses(mask)
        if shared:
            loaded = load_shared(unit, own_shared(unit, at), actors(unit, mask), kind, count)
        else:
            loaded = unit.block.memory.load(at, kind, count)
        for write, values in zip(writes, loaded, strict=True):
            write(spread(unit, values, mask), mask)

    return step


def spread(unit: Unit, values: np.ndarray, mask: Mask) -> np.ndarray:
    """Values of the threads that run, at the places of all."""
    if mask is None:
        return values
    wide = np.zeros(unit.size, values.dtype)
    wide[mask] = values
    return wide


@operation("st")
def store(unit: Unit, instruction: Instruction) -> Step:
    name = instruction.opcode[-1].replace("bf16", "b16")
    kind = KINDS[name]
    addresses = addresses_of(unit, instruction.operands[0])
    sources = [source(unit, part, name) for part in parts_of(instruction.operands[1])]
    shared = any(word.startswith("shared") for word in instruction.opcode)

    def step(mask: Mask) -> None:
        at = addresses(mask)
        given = [np.broadcast_to(np.asarray(each), unit.size) for each in sources]
        values = np.stack([each if mask is None else each[mask] for each in given]).astype(kind)
        if shared:
            store_shared(unit, own_shared(unit, at), actors(unit, mask), values)
        else:
            unit.block.memory.store(at, values)

    return step
