"""Matrix fragments: ldmatrix, stmatrix, mma and wgmma.

Sources: the chapters "Warp-level matrix instructions" and "Asynchronous warpgroup-level matrix instructions" of the PTX
ISA; the canonical layouts of operands in shared memory as in the comments of CUTLASS's mma_sm90_gmma.hpp.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .access import actors, grains, load_shared, own_shared, spread, store_shared
from .arithmetic import widen_bfloat16
from .asynchronous import finish
from .instructions import Mask, Step, addresses_of, destination, operation, parts_of, row, source
from .memory import FaultError
from .text import Instruction, Vector

if TYPE_CHECKING:
    from .machine import Unit

LANE = np.arange(32)
# Of a lane in the fragments of the m16n8 family: its row, and the first of its two columns.
ROW, COLUMN = LANE // 4, LANE % 4 * 2
UINT16, UINT32 = np.dtype(np.uint16), np.dtype(np.uint32)


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64 of elements given by their bits."""
    if kind == "bf16":
        return widen_bfloat16(bits).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    raise NotImplementedError(kind)


@operation("ldmatrix", "stmatrix")
def exchange_matrices(unit: Unit, instruction: Instruction) -> Step:
    """8×8 matrices of two-byte elements, whose rows are at addresses that eight lanes each give."""
    loads = instruction.opcode[0] == "ldmatrix"
    registers, place = instruction.operands if loads else instruction.operands[::-1]
    count = next(int(word[1]) for word in instruction.opcode if word in ("x1", "x2", "x4"))
    transposed = "trans" in instruction.opcode
    addresses = addresses_of(unit, place)
    rows = [row(unit, part.name) for part in parts_of(registers)]
    writes = [destination(unit, part) for part in parts_of(registers)]
    row_of, column_of = np.broadcast_arrays(ROW[:, None], COLUMN[:, None] + np.arange(2))
    if transposed:
        row_of, column_of = column_of, row_of

    def step(mask: Mask) -> None:
        unit.check_aligned(mask)
        at = own_shared(unit, addresses(mask)).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)
        if (at % 16).any():
            raise FaultError("a row of a matrix that does not start on 16 bytes")
        who = actors(unit, mask).reshape(-1, 32)
        for index in range(count):
            # [warps, lanes, 2]
            elements = at[:, index][:, row_of] + 2 * column_of
            owners = np.broadcast_to(who[:, :, None], elements.shape).reshape(-1)
            if loads:
                values = load_shared(unit, elements.reshape(-1), owners, UINT16, 1)[0]
                writes[index](spread(unit, values.view(np.uint32), mask), mask)
            else:
                values = rows[index] if mask is None else rows[index][mask]
                store_shared(unit, elements.reshape(-1), owners, values.astype(UINT32).view(UINT16)[None])

    return step


@operation("mma")
def multiply(unit: Unit, instruction: Instruction) -> Step:
    """d = a b + c, m16n8: fragments of A by rows and of B by columns."""
    _, _, _, shape, *layout, _, kind, _, _ = instruction.opcode
    depth = int(re.fullmatch(r"m16n8k(\d+)", shape)[1])
    if layout != ["row", "col"]:
        raise NotImplementedError(instruction.text)
    into, a, b, c = (parts_of(operand) for operand in instruction.operands)
    a_rows, b_rows, c_rows = ([source(unit, part, "b32") for part in parts] for parts in (a, b, c))
    writes = [destination(unit, part) for part in into]
    per_register = 1 if kind == "tf32" else 2

    def elements(registers: list[Any], active: Mask) -> np.ndarray:
        """[warps, lanes, registers, elements in one]"""
        words = np.stack([np.asarray(each) if active is None else np.asarray(each)[active] for each in registers], 1)
        bits = words if per_register == 1 else words.view(np.uint16)
        return numbers(bits, kind).reshape(-1, 32, len(registers), per_register)

    def step(mask: Mask) -> None:
        unit.check_aligned(mask)
        given_a, given_b = elements(a_rows, mask), elements(b_rows, mask)
        warps = len(given_a)
        left, right = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        width = depth // 2 if per_register == 2 else 4
        column = COLUMN if per_register == 2 else LANE % 4
        for register in range(given_a.shape[2]):
            for part in range(per_register):
                left[:, ROW + register % 2 * 8, column + register // 2 * width + part] = given_a[:, :, register, part]
        for register in range(given_b.shape[2]):
            for part in range(per_register):
                right[:, column + register * width + part, ROW] = given_b[:, :, register, part]
        product = left @ right
        for index, (write, start) in enumerate(zip(writes, c_rows, strict=True)):
            own = product[:, ROW + index // 2 * 8, COLUMN + index % 2].reshape(-1)
            added = np.broadcast_to(np.asarray(start).view(np.float32), unit.size)
            total = (own + (added if mask is None else added[mask])).astype(np.float32)
            write(spread(unit, total, mask), mask)

    return step


class Operand:
    """Where the elements of an operand of wgmma lie, by its descriptor."""

    def __init__(self, descriptor: int, transposed: bool, long: int, depth: int, size: int):
        start, leading, stride = ((descriptor >> low & 0x3FFF) << 4 for low in (0, 16, 32))
        swizzle = {1: 3, 2: 2, 3: 1, 0: 0}[descriptor >> 62]
        if descriptor >> 49 & 7:
            raise NotImplementedError("a base offset of a matrix descriptor")
        per_word = 16 // size  # elements in 16 bytes
        across, along = np.arange(long)[:, None], np.arange(depth)
        if transposed:
            # ((T, 2^swizzle, m), (8, k)) : ((1, T, leading), (2^swizzle T, stride)); without swizzle, strides swapped
            row_words = 1 << swizzle
            far, deep = (leading, stride) if swizzle else (stride, leading)
            inner = across % per_word * size + across // per_word % row_words * 16
            self.at = inner + across // (per_word * row_words) * far + along % 8 * 16 * row_words + along // 8 * deep
        else:
            # ((8, n), (T, 2)) : ((2^swizzle T, stride), (1, T)), without swizzle (1, leading) for the second
            row_bytes = 16 << swizzle
            step = 16 if swizzle else leading
            self.at = across % 8 * row_bytes + across // 8 * stride + along % per_word * size + along // per_word * step
        self.at = self.at + start
        self.at ^= (self.at >> 7 & ((1 << swizzle) - 1)) << 4


@operation("wgmma")
def warpgroup(unit: Unit, instruction: Instruction) -> Step:
    what = instruction.opcode[1]
    if what == "mma_async":
        return _multiply_async(unit, instruction)
    pending = int(source(unit, instruction.operands[0], "u32")) if what == "wait_group" else 0

    def step(mask: Mask) -> None:
        unit.check_aligned(mask, 128)
        if what == "commit_group":
            unit.product_groups.append([])
        elif what == "wait_group":
            finish(unit.product_groups, pending)

    return step


def _multiply_async(unit: Unit, instruction: Instruction) -> Step:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.opcode[4])
    columns, depth, kind = int(shape[1]), int(shape[2]), instruction.opcode[6]
    size = 4 if kind == "tf32" else 2
    into, a, b, scale, *more = instruction.operands
    if isinstance(a, Vector):
        raise NotImplementedError("wgmma with A in registers")
    factors = [int(source(unit, operand, "s32")) for operand in more]
    signs, transposed = factors[:2], [*map(bool, factors[2:]), False, False][:2]
    accumulators = [row(unit, part.name).view(np.float32) for part in into.parts]
    keeps = source(unit, scale, "pred")
    descriptors = [source(unit, operand, "b64") for operand in (a, b)]

    def step(mask: Mask) -> None:
        unit.check_aligned(mask, 128)
        if unit.size != 128:
            raise FaultError("a product of a warpgroup that has fewer than 128 threads")
        operands = []
        for register, long, turned in zip(descriptors, (64, columns), transposed, strict=True):
            values = np.unique(np.broadcast_to(np.asarray(register), unit.size))
            if len(values) > 1:
                raise FaultError("threads that give different matrix descriptors")
            operands.append(Operand(int(values[0]), turned, long, depth, size))
        keep = bool(np.asarray(keeps).flat[0])
        block, warps = unit.block, unit.warps(None)
        for operand in operands:
            touched = grains(operand.at.reshape(-1), size)
            block.shadow.check_read(touched, np.broadcast_to(warps[0], touched.shape[1:]))
            block.shadow.check_visible(touched)

        def read() -> list[np.ndarray]:
            kinds = UINT32 if size == 4 else UINT16
            return [numbers(block.shared.view(kinds)[operand.at // size], kind) for operand in operands]

        def perform() -> None:
            left, right = early or read()
            product = signs[0] * signs[1] * (left @ right.T)
            for index, accumulator in enumerate(accumulators):
                rows = unit.threads % 128 // 32 * 16 + np.tile(ROW, 4) + index // 2 % 2 * 8
                column = np.tile(COLUMN, 4) + index // 4 * 8 + index % 2
                accumulator[...] = product[rows, column] + (accumulator if keep else 0)
            for operand in operands:
                touched = grains(operand.at.reshape(-1), size)
                for warp in warps:
                    block.shadow.note_read(touched, np.broadcast_to(warp, touched.shape[1:]))

        early = read() if block.cluster.at_once() else None
        unit.product_groups[-1].append(perform)

    return step
