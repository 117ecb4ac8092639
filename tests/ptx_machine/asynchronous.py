"""Copies that are performed later, and the barriers in shared memory that count them.

A copy, as a product (`matrix`), is done when the seed says: where it is started, or where it is waited for at the
latest. Memory that was read or written too early or too late shows in what the kernel computes, and `races` finds it
anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .access import actors, grains, own_shared
from .instructions import Mask, Step, addresses_of, destination, operation, row, source
from .machine import PhaseBarrier, Wait
from .memory import RANK_BITS, FaultError
from .text import Address, Instruction

if TYPE_CHECKING:
    from .machine import Block, Unit

CHUNK = 16  # bytes that the swizzle keeps together


@operation("cp")
def copy(unit: Unit, instruction: Instruction) -> Step:
    words = instruction.opcode
    if words[1:3] == ("async", "commit_group"):
        return lambda mask: unit.copy_groups.append([])
    if words[1:3] == ("async", "wait_group"):
        pending = int(source(unit, instruction.operands[0], "u32"))
        return lambda mask: finish(unit.copy_groups, pending)
    if words[1:3] == ("async", "bulk"):
        return _copy_box(unit, instruction)
    return _copy_async(unit, instruction)


def finish(groups: list[list[Callable[[], None]]], pending: int) -> None:
    """Performs all but the last `pending` closed groups."""
    while len(groups) - 1 > pending:
        for perform in groups.pop(0):
            perform()


def _copy_async(unit: Unit, instruction: Instruction) -> Step:
    to, given = (addresses_of(unit, operand) for operand in instruction.operands[:2])
    size = int(source(unit, instruction.operands[2], "u32"))
    taken = source(unit, instruction.operands[3], "u32") if len(instruction.operands) > 3 else np.uint32(size)

    def step(mask: Mask) -> None:
        into, origin, who = own_shared(unit, to(mask)), given(mask), actors(unit, mask)
        length = np.broadcast_to(np.asarray(taken), unit.size)
        length = (length if mask is None else length[mask]).astype(np.int64)
        block, touched = unit.block, grains(into, size)
        block.shadow.check_write(touched, who)
        block.shared.index(into, np.dtype(f"V{size}"), 1)

        def perform() -> None:
            values = np.zeros((size, len(into)), np.uint8)
            for count in np.unique(length[length > 0]):
                some = length == count
                values[:count, some] = block.memory.load_bytes(origin[some], int(count))
            block.shared.data[into + np.arange(size)[:, None]] = values

        def complete() -> None:
            if not early:
                perform()
            block.shadow.check_write(touched, who)
            block.shadow.note_write(touched, who, generic=block.launch.copies_need_fence)

        early = block.cluster.at_once()
        if early:
            perform()
        unit.copy_groups[-1].append(complete)

    return step


class TensorMap(NamedTuple):
    """What runtime.cpp writes into a CUtensorMap: rows of `width` elements of two bytes; boxes of 64 columns, with the
    128-byte swizzle."""

    data: int
    width: int
    rows: int
    box_rows: int

    @staticmethod
    def read(block: Block, address: int) -> TensorMap:
        region = block.memory.region(address)
        at = address - region.address
        if address % 64:
            raise FaultError("a tensor map that is not aligned to 64 bytes")
        return TensorMap(*struct.unpack("<qqqq", region.data[at : at + 32].tobytes()))


def _copy_box(unit: Unit, instruction: Instruction) -> Step:
    to, given, barrier = (addresses_of(unit, instruction.operands[index]) for index in (0, 1, 2))
    column, line = (source(unit, operand, "s32") for operand in instruction.operands[1].coordinates)
    targets = source(unit, instruction.operands[3], "u16") if "multicast::cluster" in instruction.opcode else None

    def step(mask: Mask) -> None:
        cluster, block = unit.block.cluster, unit.block
        chosen = np.flatnonzero(np.ones(unit.size) if mask is None else mask)
        for thread, into, origin, counted in zip(chosen, to(mask), given(mask), barrier(mask), strict=True):
            box = _box(block, TensorMap.read(block, int(origin)), value_in(column, thread), value_in(line, thread))
            bits = 1 << block.rank if targets is None else value_in(targets, thread)
            seen = cluster.clocks.release(unit.actors[thread : thread + 1])
            for rank in range(len(cluster.blocks)):
                if bits >> rank & 1:
                    _send(cluster.blocks[rank], box, int(own_shared(unit, into)), int(own_shared(unit, counted)), seen)
            if bits >> len(cluster.blocks):
                raise FaultError("a copy to a block that the cluster does not have")

    return step


def value_in(values: Any, thread: int) -> int:
    """An operand's value in one thread."""
    values = np.asarray(values)
    return int(values[thread] if values.ndim else values)


def _box(block: Block, tensor: TensorMap, column: int, line: int) -> np.ndarray:
    """[rows, 64] elements; what lies outside of the tensor is 0."""
    box = np.zeros((tensor.box_rows, 64), np.uint16)
    rows = np.arange(max(line, 0), min(line + tensor.box_rows, tensor.rows))
    columns = np.arange(max(column, 0), min(column + 64, tensor.width))
    if len(rows) and len(columns):
        at = tensor.data + 2 * (rows[:, None] * tensor.width + columns)
        values = block.memory.load(at.reshape(-1), np.dtype(np.uint16), 1)
        box[(rows - line)[:, None], columns - column] = values.reshape(at.shape)
    return box


def _send(block: Block, box: np.ndarray, to: int, barrier: int, seen: np.ndarray) -> None:
    """Starts the copy of `box` into one block."""
    if to % 128:
        raise FaultError("a swizzled box that does not start on 128 bytes")
    clocks, shadow = block.cluster.clocks, block.shadow
    actor = np.array([clocks.copier(block.rank, barrier)])
    clocks.acquire(actor, seen)
    clocks.now[actor, actor] += 1
    at = to + 128 * np.arange(len(box))[:, None] + CHUNK * np.arange(8)
    at ^= (at >> 7 & 7) << 4
    touched = grains(at.reshape(-1), CHUNK)
    who = np.broadcast_to(actor, touched.shape[1:])
    shadow.check_write(touched, who)
    shadow.note_write(touched, who, generic=False)
    counted, done = block.phase(barrier), clocks.now[actor[0]].copy()
    # Until it has come, what was there before may be read or not: neither is meant.
    index = at.reshape(-1)[:, None] + np.arange(CHUNK)
    block.shared.data[index] = 0xFF

    def perform() -> None:
        block.shared.data[index] = box.view(np.uint8).reshape(-1, CHUNK)
        counted.arrive(0, -box.nbytes, done)

    if block.cluster.at_once():
        perform()
    else:
        block.cluster.copies.append(perform)


@operation("mapa")
def map_address(unit: Unit, instruction: Instruction) -> Step:
    write = destination(unit, instruction.operands[0])
    address, rank = (source(unit, operand, "u32") for operand in instruction.operands[1:])
    return lambda mask: write(np.asarray(address) | (np.asarray(rank) + 1).astype(np.uint32) << RANK_BITS, mask)


@operation("fence")
def fence(unit: Unit, instruction: Instruction) -> Step:
    if "proxy" not in instruction.opcode:
        return lambda mask: None
    return lambda mask: unit.block.shadow.fence(unit.warps(mask))


@operation("mbarrier")
def phase_barrier(unit: Unit, instruction: Instruction) -> Step:
    what = instruction.opcode[1]
    if what == "try_wait":
        return _wait(unit, instruction)
    place = next(operand for operand in instruction.operands if isinstance(operand, Address))
    addresses, clocks = addresses_of(unit, place), unit.block.cluster.clocks
    last = instruction.operands[-1]
    number = None if isinstance(last, Address) else source(unit, last, "u32")
    expects = "expect_tx" in instruction.opcode

    def step(mask: Mask) -> None:
        chosen = np.flatnonzero(np.ones(unit.size) if mask is None else mask)
        for thread, address in zip(chosen, addresses(mask), strict=True):
            block, at = _place(unit, int(address))
            given = None if number is None else value_in(number, thread)
            if what == "init":
                block.phases[at] = PhaseBarrier(given, given)
            elif what == "arrive":
                seen = clocks.release(unit.actors[thread : thread + 1])
                arrivals = 1 if expects or given is None else given
                block.phase(at).arrive(arrivals, given if expects else 0, seen)
            else:
                raise NotImplementedError(instruction.text)

    return step


def _place(unit: Unit, address: int) -> tuple[Block, int]:
    rank = address >> RANK_BITS
    block = unit.block if rank == 0 else unit.block.cluster.blocks[rank - 1]
    at = address & ((1 << RANK_BITS) - 1)
    if at % 8 or at + 8 > len(block.shared.data):
        raise FaultError(f"an mbarrier at {at:#x}, not a multiple of 8 in shared memory")
    return block, at


def _wait(unit: Unit, instruction: Instruction) -> Step:
    if "parity" not in instruction.opcode:
        raise NotImplementedError(instruction.text)
    predicate, write = row(unit, instruction.operands[0].name), destination(unit, instruction.operands[0])
    addresses, parity = addresses_of(unit, instruction.operands[1]), source(unit, instruction.operands[2], "u32")

    def step(mask: Mask) -> Wait | None:
        at = np.unique(addresses(mask))
        wanted = np.unique(np.broadcast_to(np.asarray(parity), unit.size)[unit.everyone if mask is None else mask])
        if len(at) > 1 or len(wanted) > 1:
            raise NotImplementedError("threads that wait for different mbarriers at one time")
        block, place = _place(unit, int(at[0]))
        barrier = block.phase(place)
        # The wait for parity p ends with a phase of parity p; before the first one, parity 1 counts as over.
        if barrier.phase & 1 == int(wanted[0]):
            if unit.block.cluster.at_once():
                write(np.zeros_like(predicate), mask)
                return None
            return Wait(lambda: barrier.phase & 1 != int(wanted[0]), again=True)
        unit.block.cluster.clocks.acquire(unit.warps(mask), barrier.completed)
        write(np.ones_like(predicate), mask)
        return None

    return step
