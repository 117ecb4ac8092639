"""Numbers: arithmetic, comparisons, conversions, moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .instructions import KINDS, Mask, Step, destination, operation, row, source
from .text import BITS, Instruction, Name, Vector

if TYPE_CHECKING:
    from .machine import Unit


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def widen(values: Any, kind: str) -> np.ndarray:
    """float32 of narrow numbers."""
    return widen_bfloat16(values) if kind == "bf16" else np.asarray(values).astype(np.float32)


def round_bfloat16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _flush(values: Any) -> np.ndarray:
    """Denormal numbers become 0, as with .ftz."""
    values = np.asarray(values)
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _shift_left(a: Any, by: Any) -> np.ndarray:
    a = np.asarray(a)
    bits = 8 * a.dtype.itemsize
    by = np.asarray(by).astype(np.uint64)
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Any, by: Any) -> np.ndarray:
    a = np.asarray(a)
    bits = 8 * a.dtype.itemsize
    by = np.asarray(by).astype(np.uint64)
    gone = -(a < 0).astype(a.dtype) if a.dtype.kind == "i" else np.zeros((), a.dtype)
    return np.where(by < bits, a >> np.minimum(by, bits - 1).astype(a.dtype), gone).astype(a.dtype)


def _divide(a: Any, b: Any) -> np.ndarray:
    """Towards zero."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind == "f":
        return a / b
    magnitude = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    signed = magnitude if a.dtype.kind == "u" else np.where((a < 0) != (b < 0), -magnitude, magnitude)
    return np.where(b == 0, np.array(-1).astype(a.dtype), signed).astype(a.dtype)


def _remainder(a: Any, b: Any) -> np.ndarray:
    return (np.asarray(a) - _divide(a, b) * np.asarray(b)).astype(np.asarray(a).dtype)


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """One rounding for float32: products of two are exact in float64."""
    kind = np.asarray(a).dtype
    return (np.asarray(a).astype(np.float64) * np.asarray(b) + np.asarray(c)).astype(kind)


SIMPLE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax, "neg": np.negative,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "fma": _fma,
    "shl": _shift_left, "shr": _shift_right, "div": _divide, "rem": _remainder,
    "ex2": np.exp2, "sqrt": np.sqrt, "rcp": np.reciprocal,
}  # fmt: skip


@operation(*SIMPLE)
def simple(unit: Unit, instruction: Instruction) -> Step:
    name, kind = instruction.opcode[0], instruction.opcode[-1]
    if kind == "f32x2":
        return _in_pairs(unit, instruction)
    check_words(instruction.opcode[1:-1], "rn", "approx", "full", "ftz", "f32")
    function, flushed = SIMPLE[name], "ftz" in instruction.opcode
    kinds = [kind] * (len(instruction.operands) - 1)
    if name in ("shl", "shr"):
        kinds = [kind, "u32"]
    elif "f32" in instruction.opcode[1:-1]:
        kinds[-1] = "f32"  # narrow numbers added to a wide one
    mixed = kinds[-1] == "f32" != kind
    sources = [source(unit, operand, each) for operand, each in zip(instruction.operands[1:], kinds, strict=True)]
    write = destination(unit, instruction.operands[0])

    def step(mask: Mask) -> None:
        given = [_flush(value) for value in sources] if flushed else sources
        if mixed:
            given = [*(widen(value, kind) for value in given[:-1]), given[-1]]
        result = function(*given)
        write(_flush(result) if flushed else result, mask)

    return step


def _in_pairs(unit: Unit, instruction: Instruction) -> Step:
    """Two float32 in each register."""
    check_words(instruction.opcode[1:-1], "rn")
    function = {**SIMPLE, "mul": np.multiply}[instruction.opcode[0]]
    into, *given = (row(unit, operand.name).view(np.float32).reshape(-1, 2) for operand in instruction.operands)

    def step(mask: Mask) -> None:
        into[slice(None) if mask is None else mask] = function(*given)[slice(None) if mask is None else mask]

    return step


@operation("mul", "mad")
def multiply(unit: Unit, instruction: Instruction) -> Step:
    if instruction.opcode[-1] == "f32x2":
        return _in_pairs(unit, instruction)
    check_words(instruction.opcode[1:-1], "lo", "wide", "rn")
    kind, wide = instruction.opcode[-1], "wide" in instruction.opcode
    target = f"{kind[0]}{2 * BITS[kind]}" if wide else kind
    factors = [source(unit, operand, kind) for operand in instruction.operands[1:3]]
    added = [source(unit, operand, target) for operand in instruction.operands[3:]]
    write = destination(unit, instruction.operands[0])
    into = KINDS[target]

    def step(mask: Mask) -> None:
        a, b = (np.asarray(factor).astype(into) for factor in factors)
        product = a * b
        for more in added:
            product = product + more
        write(product, mask)

    return step


@operation("bfe", "bfi")
def bit_field(unit: Unit, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    insert = instruction.opcode[0] == "bfi"
    *values, position, length = instruction.operands[1:]
    given = [source(unit, operand, kind) for operand in values]
    first, count = source(unit, position, "u32"), source(unit, length, "u32")
    write = destination(unit, instruction.operands[0])
    bits, unsigned = BITS[kind], KINDS[f"u{BITS[kind]}"]

    def step(mask: Mask) -> None:
        low = np.minimum(np.asarray(first) & 255, bits).astype(np.uint64)
        size = np.minimum(np.asarray(count) & 255, bits).astype(np.uint64)
        ones = _shift_left(np.uint64(1), size) - np.uint64(1)
        if insert:
            field, base = (np.asarray(value).astype(unsigned).astype(np.uint64) for value in given)
            placed = _shift_left(ones, low)
            result = (base & ~placed) | (_shift_left(field, low) & placed)
        else:
            result = _shift_right(np.asarray(given[0]).astype(unsigned).astype(np.uint64), low) & ones
            if kind[0] == "s":
                sign = _shift_right(result, np.maximum(size, 1) - np.uint64(1)) & np.uint64(1)
                result = np.where((sign == 1) & (size > 0), result | ~ones, result)
        write(result.astype(unsigned), mask)

    return step


def check_words(words: tuple[str, ...], *known: str) -> None:
    """Refuses an instruction with a modifier that is not read here."""
    if not set(words) <= set(known):
        raise NotImplementedError(f"modifiers {words}: known here are {known}")


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@operation("setp")
def set_predicate(unit: Unit, instruction: Instruction) -> Step:
    name, kind = instruction.opcode[1], instruction.opcode[-1]
    check_words(instruction.opcode[2:-1], *COMBINED)
    unordered = name.endswith("u") and kind[0] == "f"
    compare = COMPARISONS[name[:-1] if unordered else name]
    combine = next((COMBINED[word] for word in instruction.opcode[2:-1] if word in COMBINED), None)
    operands = instruction.operands
    further = source(unit, operands[-1], "pred") if combine else None
    a, b = (source(unit, operand, kind) for operand in (operands[-3:-1] if combine else operands[-2:]))
    writes = [destination(unit, operand) for operand in operands[: len(operands) - (3 if combine else 2)]]

    def step(mask: Mask) -> None:
        result = compare(a, b)
        if kind[0] == "f":
            nan = np.isnan(a) | np.isnan(b)
            result = result | nan if unordered else result & ~nan
        writes[0](np.broadcast_to(result if combine is None else combine(result, further), unit.size), mask)
        for write in writes[1:]:
            write(np.broadcast_to(~result if combine is None else combine(~result, further), unit.size), mask)

    return step


@operation("selp")
def select(unit: Unit, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    a, b = (source(unit, operand, kind) for operand in instruction.operands[1:3])
    chosen = source(unit, instruction.operands[3], "pred")
    write = destination(unit, instruction.operands[0])
    return lambda mask: write(np.where(chosen, a, b), mask)


@operation("mov")
def move(unit: Unit, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    into, given = instruction.operands
    if isinstance(into, Vector):
        return _unpack(unit, into, given, kind)
    if isinstance(given, Vector):
        return _pack(unit, into, given, kind)
    value, write = source(unit, given, kind), destination(unit, into)
    return lambda mask: write(value, mask)


def _unpack(unit: Unit, into: Vector, given: Any, kind: str) -> Step:
    value = source(unit, given, kind.replace("f", "b"))
    bits = BITS[kind] // len(into.parts)
    writes = [destination(unit, part) for part in into.parts]

    def step(mask: Mask) -> None:
        whole = np.broadcast_to(np.asarray(value), unit.size)
        for i, write in enumerate(writes):
            write(_shift_right(whole, bits * i).astype(KINDS[f"u{bits}"]), mask)

    return step


def _pack(unit: Unit, into: Name, given: Vector, kind: str) -> Step:
    bits = BITS[kind] // len(given.parts)
    values = [source(unit, part, f"b{bits}") for part in given.parts]
    write = destination(unit, into)

    def step(mask: Mask) -> None:
        result = np.zeros(unit.size, KINDS[f"u{BITS[kind]}"])
        for i, value in enumerate(values):
            result |= _shift_left(np.asarray(value).astype(result.dtype), bits * i)
        write(result, mask)

    return step


@operation("cvt")
def convert(unit: Unit, instruction: Instruction) -> Step:
    into, given = instruction.opcode[-2:]
    check_words(instruction.opcode[1:-2], "rn", "rzi", "rni", "rmi", "rpi")
    if into in ("bf16x2", "f16x2"):
        return _convert_pair(unit, instruction, into)
    value, write = source(unit, instruction.operands[1], given), destination(unit, instruction.operands[0])

    def step(mask: Mask) -> None:
        values = widen_bfloat16(value) if given == "bf16" else np.asarray(value)
        if into == "bf16":
            write(round_bfloat16(values), mask)
            return
        kind = KINDS[into]
        if values.dtype.kind == "f" and kind.kind in "ui":
            rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[instruction.opcode[1]](values)
            limits = np.iinfo(kind)
            values = np.clip(np.nan_to_num(rounded.astype(np.float64)), limits.min, limits.max)
        write(values.astype(kind), mask)

    return step


def _convert_pair(unit: Unit, instruction: Instruction, into: str) -> Step:
    """The first source becomes the upper half."""
    high, low = (source(unit, operand, "f32") for operand in instruction.operands[1:])
    write = destination(unit, instruction.operands[0])

    def narrow(values: Any) -> np.ndarray:
        if into == "bf16x2":
            return round_bfloat16(np.asarray(values))
        return np.asarray(values).astype(np.float16).view(np.uint16)

    return lambda mask: write(narrow(high).astype(np.uint32) << 16 | narrow(low).astype(np.uint32), mask)


@operation("cvta")
def convert_address(unit: Unit, instruction: Instruction) -> Step:
    """Global addresses and those of parameters are generic ones here."""
    if not {"global", "param"} & set(instruction.opcode):
        raise NotImplementedError(instruction.text)
    value, write = (
        source(unit, instruction.operands[1], instruction.opcode[-1]),
        destination(unit, instruction.operands[0]),
    )
    return lambda mask: write(value, mask)


@operation("createpolicy")
def create_policy(unit: Unit, instruction: Instruction) -> Step:
    write = destination(unit, instruction.operands[0])
    return lambda mask: write(np.zeros(unit.size, np.uint64), mask)


@operation("shfl")
def shuffle(unit: Unit, instruction: Instruction) -> Step:
    way, operands = instruction.opcode[2], list(instruction.operands)
    in_range = destination(unit, operands.pop(1)) if len(operands) == 6 else None
    value, by, clamp = (source(unit, operand, "u32") for operand in operands[1:4])
    write, lane = destination(unit, operands[0]), np.arange(unit.size) % 32

    def step(mask: Mask) -> None:
        unit.check_aligned(mask)
        distance, bound = np.asarray(by).astype(np.int64), np.asarray(clamp).astype(np.int64)
        segment = bound >> 8 & 31
        last = (lane & segment) | (bound & 31 & ~segment)
        from_lane = {"bfly": lane ^ distance, "down": lane + distance, "up": lane - distance,
                     "idx": (lane & segment) | (distance & 31 & ~segment)}[way]  # fmt: skip
        valid = from_lane >= last if way == "up" else from_lane <= last
        taken = np.where(valid, from_lane, lane) + np.arange(unit.size) // 32 * 32
        write(np.asarray(value)[taken], mask)
        if in_range:
            in_range(valid, mask)

    return step


@operation("redux")
def reduce_warp(unit: Unit, instruction: Instruction) -> Step:
    function = {"max": np.max, "min": np.min, "add": np.sum}[instruction.opcode[2]]
    value = source(unit, instruction.operands[1], instruction.opcode[-1])
    write = destination(unit, instruction.operands[0])

    def step(mask: Mask) -> None:
        unit.check_aligned(mask)
        write(np.repeat(function(np.asarray(value).reshape(-1, 32), 1), 32), mask)

    return step
