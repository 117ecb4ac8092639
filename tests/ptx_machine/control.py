"""Jumps, and barriers among threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .instructions import Mask, Step, operation, source
from .machine import NamedBarrier, Split, Wait
from .text import Instruction

if TYPE_CHECKING:
    from .machine import Unit


@operation("bra")
def branch(unit: Unit, instruction: Instruction) -> Step:
    target = unit.block.launch.kernel.labels[instruction.operands[0].name]
    return lambda mask: target


@operation("ret")
def end(unit: Unit, instruction: Instruction) -> Step:
    return lambda mask: Split(unit.everyone.copy() if mask is None else mask, None)


@operation("bar", "barrier")
def barrier(unit: Unit, instruction: Instruction) -> Step:
    words = instruction.opcode
    if "cluster" in words:
        return _cluster_barrier(unit, words)
    waits, aligned = "arrive" not in words, words[0] == "bar" or "aligned" in words
    number = source(unit, instruction.operands[0], "u32")
    expected = source(unit, instruction.operands[1], "u32") if len(instruction.operands) > 1 else None

    def step(mask: Mask) -> Wait | None:
        if aligned:
            unit.check_aligned(mask)
        index = int(np.asarray(number).flat[0])
        threads = unit.block.running_threads if expected is None else int(np.asarray(expected).flat[0])
        return _arrive(unit, unit.block.named[index], mask, threads, waits)

    return step


def _cluster_barrier(unit: Unit, words: tuple[str, ...]) -> Step:
    cluster = unit.block.cluster
    threads = len(cluster.blocks) * unit.block.launch.threads

    def step(mask: Mask) -> Wait | None:
        if "aligned" in words:
            unit.check_aligned(mask)
        if "arrive" in words:
            unit.cluster_generation = _arrive_at(unit, cluster.barrier, mask, threads)
            return None
        return _wait_for(unit, cluster.barrier, mask, unit.cluster_generation)

    return step


def _arrive(unit: Unit, barrier: NamedBarrier, mask: Mask, threads: int, waits: bool) -> Wait | None:
    generation = _arrive_at(unit, barrier, mask, threads)
    return _wait_for(unit, barrier, mask, generation) if waits else None


def _arrive_at(unit: Unit, barrier: NamedBarrier, mask: Mask, threads: int) -> int:
    seen = unit.block.cluster.clocks.release(unit.warps(mask))
    return barrier.arrive(unit.size if mask is None else int(mask.sum()), threads, seen)


def _wait_for(unit: Unit, barrier: NamedBarrier, mask: Mask, generation: int) -> Wait:
    warps, clocks = unit.warps(mask), unit.block.cluster.clocks

    def ready() -> bool:
        if generation not in barrier.completed:
            return False
        clocks.acquire(warps, barrier.completed[generation])
        return True

    return Wait(ready)


@operation("setmaxnreg")
def change_registers(unit: Unit, instruction: Instruction) -> Step:
    """Changes no value; all threads of a warpgroup have to run it."""
    return lambda mask: unit.check_aligned(mask, 128)
