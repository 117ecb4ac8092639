"""Blocks of a cluster, their threads and what they wait for.

Threads run in units of a warpgroup, in lockstep where they are at the same instruction, and units in an order that a
seed draws. What is asynchronous happens at once or as late as it may, by turns that the seed draws too.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import PARAMETERS, FaultError, Memory, Region
from .races import Clocks, NoShadow, Shadow
from .text import Kernel

WARP, GROUP = 32, 128
MOST_BARRIERS = 64
# Dynamic shared memory begins on a multiple of this; a kernel that asks for more has to see to it itself.
SHARED_BASE = 1024
# What a register holds that nobody wrote.
UNWRITTEN = {np.dtype(bool): True} | {np.dtype(f"uint{bits}"): 2**bits - 1 for bits in (16, 32, 64)}
PLACE = ("%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y")


@dataclass
class Launch:
    """`shared_base` is where the block's shared memory starts. `copies_need_fence`: what `cp.async` brings is for the
    tensor cores only after a fence."""

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    parameters: bytes
    dynamic_bytes: int = 0
    cluster: int = 1
    shared_base: int = SHARED_BASE
    search_races: bool = True
    copies_need_fence: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """What compiled instructions depend on."""
        return self.threads, self.dynamic_bytes, self.cluster, self.shared_base


class DivergedError(FaultError):
    """An instruction for all threads of a warp that some of them have not reached yet."""


class Waiting:
    """Threads that go on at `pc` once `ready` holds."""

    def __init__(self, pc: int, mask: np.ndarray, ready: Callable[[], bool]):
        self.pc, self.mask, self.ready = pc, mask, ready


class Split:
    """Of the threads that run, those in `taken` go on at `target`; None: they end."""

    def __init__(self, taken: np.ndarray, target: int | None):
        self.taken, self.target = taken, target


class Wait:
    """The threads that run go on after (or, with `again`, at) this instruction once `ready` holds."""

    def __init__(self, ready: Callable[[], bool], again: bool = False):
        self.ready, self.again = ready, again


class NamedBarrier:
    """Counts threads, whether they wait or not."""

    def __init__(self) -> None:
        self.arrived, self.generation = 0, 0
        self.seen: np.ndarray | int = 0
        self.completed: dict[int, Any] = {}

    def arrive(self, threads: int, expected: int, seen: np.ndarray) -> int:
        """The generation that these threads belong to."""
        self.arrived += threads
        self.seen = np.maximum(self.seen, seen)
        generation = self.generation
        if self.arrived > expected:
            raise FaultError(f"{self.arrived} threads at a barrier for {expected}")
        if self.arrived == expected:
            self.completed[generation] = self.seen
            self.arrived, self.generation, self.seen = 0, generation + 1, 0
        return generation


@dataclass
class PhaseBarrier:
    """mbarrier: arrivals and bytes; tells a phase by its parity only."""

    arrivals: int
    pending: int
    bytes: int = 0
    phase: int = 0
    seen: Any = 0
    completed: Any = 0

    def arrive(self, arrivals: int, expected_bytes: int, seen: np.ndarray) -> None:
        self.pending -= arrivals
        self.bytes += expected_bytes
        self.seen = np.maximum(self.seen, seen)
        if self.pending < 0:
            raise FaultError("more arrivals at an mbarrier than its phase expects")
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.completed = self.arrivals, self.seen
            self.phase += 1


class Block:
    def __init__(self, launch: Launch, cluster: Cluster, rank: int):
        self.launch, self.cluster, self.rank = launch, cluster, rank
        kernel, base = launch.kernel, launch.shared_base
        self.variables = {name: base + at for name, at in kernel.shared.items()}
        static = (base + kernel.static_bytes + 15) // 16 * 16
        if kernel.dynamic:
            self.variables[kernel.dynamic] = static
        size = static + launch.dynamic_bytes
        self.shared = Region(f"shared memory of block {rank}", 0, np.empty(size + -size % 16, np.uint8))
        self.units = [Unit(self, first) for first in range(0, launch.threads, GROUP)]

    def begin(self, launch: Launch, memory: Memory, x: int, y: int) -> None:
        """Becomes the block at this place of the launch's grid."""
        self.launch, self.memory = launch, memory
        # Memory that nobody wrote reads as NaN.
        self.shared.data[:] = 0xFF
        warps = self.launch.threads // WARP
        kind = Shadow if launch.search_races else NoShadow
        self.shadow = kind(len(self.shared.data), self.rank * warps, warps, self.cluster.clocks)
        self.named = [NamedBarrier() for _ in range(16)]
        self.phases: dict[int, PhaseBarrier] = {}
        for unit in self.units:
            unit.begin(x, y)

    def phase(self, address: int) -> PhaseBarrier:
        if address not in self.phases:
            raise FaultError(f"no mbarrier was initialised at {address:#x}")
        return self.phases[address]

    @property
    def running_threads(self) -> int:
        return sum(unit.alive for unit in self.units)


class Cluster:
    """Blocks that run at one time. Launches of the same shape take them again, with their compiled instructions."""

    def __init__(self, launch: Launch):
        self.clocks = Clocks(launch.cluster * (launch.threads // WARP), MOST_BARRIERS)
        # Copies under way, each as what performs it.
        self.copies: list[Callable[[], None]] = []
        self.blocks = [Block(launch, self, rank) for rank in range(launch.cluster)]

    def at_once(self) -> bool:
        """Whether something asynchronous happens now rather than as late as it may."""
        return bool(self.random.integers(2))

    def run(self, launch: Launch, memory: Memory, random: np.random.Generator, x: int, y: int) -> None:
        """The blocks from this place of the grid on."""
        self.random = random
        self.clocks.reset()
        self.barrier = NamedBarrier()
        self.copies.clear()
        for rank, block in enumerate(self.blocks):
            block.begin(launch, memory, x + rank, y)
        units = [unit for block in self.blocks for unit in block.units]
        while any(unit.alive for unit in units):
            order = self.random.permutation(len(units))
            moved = [units[index].advance(int(self.random.integers(1, 400))) for index in order]
            if self.copies and (not any(moved) or self.random.integers(4) == 0):
                self.copies.pop(int(self.random.integers(len(self.copies))))()
            elif not any(moved):
                stuck = "; ".join(f"block {u.block.rank} {text}" for u in units for text in u.where())
                raise FaultError(f"all threads wait: {stuck}")
        if self.copies:
            raise FaultError("a copy into shared memory that nobody waited for")


class Unit:
    """Up to 128 threads. Registers are rows of a value for each thread; compiled instructions hold them and stay."""

    def __init__(self, block: Block, first: int):
        self.block, self.first = block, first
        self.size = min(GROUP, block.launch.threads - first)
        self.code = block.launch.kernel.code
        self.steps: list[Callable[[np.ndarray | None], Any] | None] = [None] * len(self.code)
        self.everyone = np.ones(self.size, bool)
        self.threads = first + np.arange(self.size)
        # Of each thread: its warp among those of the cluster.
        self.actors = (block.rank * block.launch.threads + self.threads) // WARP
        self.all_warps = np.unique(self.actors)
        self.registers: dict[str, np.ndarray] = {}
        special = dict.fromkeys((*PLACE, "%tid.y", "%tid.z", "%ctaid.z"), 0) | {
            "%tid.x": self.threads, "%laneid": self.threads % WARP, "%ntid.x": block.launch.threads, "%nctaid.z": 1,
            "%cluster_ctarank": block.rank,
        }  # fmt: skip
        self.special = {name: np.broadcast_to(value, self.size).astype(np.uint32) for name, value in special.items()}

    def begin(self, x: int, y: int) -> None:
        for name, value in zip(PLACE, (x, y, *self.block.launch.grid), strict=True):
            self.special[name].fill(value)
        for values in self.registers.values():
            values.fill(UNWRITTEN[values.dtype])
        self.groups: dict[int, np.ndarray] = {0: self.everyone}
        self.waiting: list[Waiting] = []
        # Where threads wait for the rest of their warp.
        self.parked: set[int] = set()
        self.alive, self.cluster_generation = self.size, 0
        # Asynchronous copies and products by groups in order, the last one still open.
        self.copy_groups: list[list[Any]] = [[]]
        self.product_groups: list[list[Any]] = [[]]

    def warps(self, mask: np.ndarray | None) -> np.ndarray:
        """The actors of threads that run, each warp once."""
        return self.all_warps if mask is None else np.unique(self.actors[mask])

    def check_aligned(self, mask: np.ndarray | None, width: int = WARP) -> None:
        """All threads of each warp (or warpgroup) run this instruction, or none does."""
        if mask is not None:
            together = mask.reshape(-1, width) if self.size % width == 0 else None
            if together is None or (together.any(1) != together.all(1)).any():
                raise DivergedError(f"needs all threads of {width}, some are elsewhere")

    def where(self) -> Iterator[str]:
        for waiting in self.waiting:
            threads = self.threads[waiting.mask]
            yield f"threads {threads[0]}..{threads[-1]} at `{self.code[waiting.pc].text}`"
        for pc in self.parked:
            yield f"a part of a warp, from thread {self.threads[self.groups[pc]][0]}, at `{self.code[pc].text}`"

    def advance(self, budget: int) -> bool:
        """Runs up to `budget` instructions; whether there was one to run.

        Those that are behind go first, so that threads meet again; at an instruction of a whole warp they wait for the
        rest, as the compiler sees to on the hardware.
        """
        for waiting in [waiting for waiting in self.waiting if waiting.ready()]:
            self.waiting.remove(waiting)
            self.resume(waiting.pc, waiting.mask)
        moved = False
        while budget > 0 and len(self.groups) > len(self.parked):
            pc = min(self.groups.keys() - self.parked)
            budget, moved = self.run_group(pc, self.groups.pop(pc), budget), True
        return moved

    def resume(self, pc: int, mask: np.ndarray) -> None:
        self.parked.discard(pc)
        self.groups[pc] = self.groups[pc] | mask if pc in self.groups else mask

    def park(self, pc: int, mask: np.ndarray) -> None:
        """Waits for the rest of a warp, unless it is waiting there."""
        alone = pc not in self.groups
        self.resume(pc, mask)
        if alone:
            self.parked.add(pc)

    def run_group(self, pc: int, mask: np.ndarray, budget: int) -> int:
        """Runs the threads in `mask` until they meet others, wait, end or have used up the budget."""
        ahead = min(self.groups, default=sys.maxsize)
        active = None if mask.all() else mask
        steps = self.steps
        while budget > 0:
            budget -= 1
            step = steps[pc] or self.compile(pc)
            try:
                result = step(active)
            except DivergedError:
                self.park(pc, mask)
                return budget
            except FaultError as fault:
                where = f"block {self.block.rank}, threads from {self.threads[mask][0]}"
                raise FaultError(f"{fault}: {where}, at `{self.code[pc].text}`") from None
            if result is None:
                pc += 1
            elif type(result) is int:
                pc = result
            else:
                mask = self.part(pc, mask, result)
                pc += 1
                if not mask.any():
                    return budget
                active = mask
            if pc >= ahead:
                break
        self.resume(pc, mask)
        return budget

    def part(self, pc: int, mask: np.ndarray, result: Split | Wait) -> np.ndarray:
        """The threads that go on with the next instruction."""
        if isinstance(result, Wait):
            self.waiting.append(Waiting(pc if result.again else pc + 1, mask, result.ready))
            return np.zeros_like(mask)
        if result.target is None:
            self.alive -= int(result.taken.sum())
        else:
            self.resume(result.target, result.taken)
        return mask & ~result.taken

    def compile(self, pc: int) -> Callable[[np.ndarray | None], Any]:
        from .decoding import compile_instruction

        step = compile_instruction(self, self.code[pc])
        self.steps[pc] = step
        return step


def run(launch: Launch, memory: Memory, seed: int = 0) -> None:
    """All blocks of a launch, cluster by cluster."""
    kernel = launch.kernel
    if len(launch.parameters) != kernel.parameter_bytes:
        raise FaultError(f"{len(launch.parameters)} bytes of parameters for {kernel.parameter_bytes}")
    if launch.threads % WARP:
        raise FaultError(f"{launch.threads} threads, not a multiple of {WARP}")
    memory.place("parameters", PARAMETERS, launch.parameters)
    shape, random = launch.shape, np.random.default_rng(seed)
    cluster = kernel.machines[shape] = kernel.machines.get(shape) or Cluster(launch)
    # Instructions become functions by the ten thousand, and none of them is garbage before the end.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with np.errstate(all="ignore"):
            for y in range(launch.grid[1]):
                for x in range(0, launch.grid[0], launch.cluster):
                    cluster.run(launch, memory, random, x, y)
    finally:
        if collecting:
            gc.enable()
