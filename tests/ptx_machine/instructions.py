"""What single instructions do, for all threads of a unit that run them.

An instruction is compiled once for each unit, into a function of the mask of threads that run (None: all).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .machine import UNWRITTEN
from .memory import PARAMETERS
from .text import Address, Immediate, Instruction, Name, Vector

if TYPE_CHECKING:
    from .machine import Unit

Mask = np.ndarray | None
Step = Callable[[Mask], Any]
KINDS = {"pred": np.dtype(bool), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
KINDS |= {f"{letter}{bits}": np.dtype(f"uint{bits}") for letter in "bu" for bits in (8, 16, 32, 64)}
KINDS |= {f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
SIZES = {1: np.dtype(bool), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
OPERATIONS: dict[str, Callable[[Unit, Instruction], Step]] = {}


def operation(*names: str) -> Callable:
    """Registers what compiles instructions whose first word is among `names`."""

    def register(build: Callable[[Unit, Instruction], Step]) -> Callable[[Unit, Instruction], Step]:
        OPERATIONS.update(dict.fromkeys(names, build))
        return build

    return register


def row(unit: Unit, name: str) -> np.ndarray:
    """A register's value in each thread."""
    if name not in unit.registers:
        kind = SIZES[unit.block.launch.kernel.registers[name]]
        unit.registers[name] = np.full(unit.size, UNWRITTEN[kind], kind)
    return unit.registers[name]


def symbol(unit: Unit, name: str) -> int:
    """The address of a variable, in its own space."""
    kernel = unit.block.launch.kernel
    if name in kernel.parameters:
        return PARAMETERS + kernel.parameters[name][0]
    return unit.block.variables[name]


def source(unit: Unit, operand: Any, kind: str) -> np.ndarray | np.generic:
    """What holds the operand's values, seen as `kind`; changes with the register."""
    wanted = KINDS["u16" if kind == "bf16" else kind]
    if isinstance(operand, Immediate):
        if wanted.kind == "b":
            return np.bool_(operand.value)
        bits = 8 * wanted.itemsize
        return np.array([operand.value % 2**bits], f"u{wanted.itemsize}").view(wanted)[0]
    if operand.name in unit.special or operand.name in unit.block.launch.kernel.registers:
        values = unit.special[operand.name] if operand.name in unit.special else row(unit, operand.name)
        return values.view(wanted) if values.dtype.itemsize == wanted.itemsize else _Narrow(values, wanted)
    return wanted.type(symbol(unit, operand.name))


class _Narrow:
    """The lower part of a wider register."""

    def __init__(self, values: np.ndarray, kind: np.dtype):
        self.values, self.kind = values, kind

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        size = self.kind.itemsize
        low = self.values.view(np.uint8).reshape(len(self.values), -1)[:, :size].copy().view(self.kind)[:, 0]
        return low if dtype is None else low.astype(dtype)


def destination(unit: Unit, operand: Any) -> Callable[[np.ndarray, Mask], None]:
    """Writes values of the register's size or, extended by their own sign, of a smaller one."""
    if operand.name == "_":
        return lambda values, mask: None
    into = row(unit, operand.name)
    views = {"b": into}
    if into.dtype != bool:
        size = 8 * into.dtype.itemsize
        views = {"u": into, "i": into.view(f"int{size}"), "f": into.view(f"float{size}")}

    def write(values: np.ndarray, mask: Mask) -> None:
        values = np.asarray(values)
        kind = values.dtype.kind
        view = views[kind] if kind != "f" or values.dtype.itemsize == into.dtype.itemsize else into
        if mask is None:
            view[...] = values
        else:
            np.copyto(view, values, where=mask, casting="unsafe")

    return write


def addresses_of(unit: Unit, address: Address) -> Callable[[Mask], np.ndarray]:
    """int64 address in each thread that runs."""
    if isinstance(address.base, Immediate):
        base = np.full(unit.size, address.base.value, np.int64)
    else:
        known = isinstance(address.base, Name) and address.base.name in unit.block.launch.kernel.registers
        if not known:
            base = np.full(unit.size, symbol(unit, address.base.name), np.int64)
        else:
            base = row(unit, address.base.name)
    offset = address.offset
    return lambda mask: (base if mask is None else base[mask]).astype(np.int64) + offset


def parts_of(operand: Any) -> tuple[Any, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def count_of(opcode: tuple[str, ...]) -> int:
    return next((int(word[1]) for word in opcode if word in ("v2", "v4", "v8")), 1)
