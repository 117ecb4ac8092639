"""PTX as text, read into kernels of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BITS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
BITS |= {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
FLOATS = ("0f", "0F", "0d", "0D")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
VARIABLE = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+(?:\d+\s+)?)*)?([\w$]+)(?:\[(\d+)\])?"
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
LABEL = re.compile(r"\s*([\w$]+):(?!:)")
GUARD = re.compile(r"@(!?)([%\w]+)\s+")


class Immediate(NamedTuple):
    """A number; a float is given by its bits."""

    text: str

    @property
    def value(self) -> int:
        return int(self.text[2:], 16) if self.text[:2] in FLOATS else int(self.text.rstrip("U"), 0)


class Name(NamedTuple):
    """Of a register, a special register, a variable or a label."""

    name: str


class Address(NamedTuple):
    """`[base + offset, {coordinates}]`"""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...] = ()


class Vector(NamedTuple):
    parts: tuple[Operand, ...]


Operand = Immediate | Name | Address | Vector


class Instruction(NamedTuple):
    """`opcode` cut at its dots; `guard` is a predicate register and whether it is negated."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str


@dataclass
class Kernel:
    """Offsets in bytes. `dynamic` is the symbol of dynamic shared memory; `machines` ran it, by shape of launch."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_bytes: int = 0
    dynamic: str | None = None
    registers: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    machines: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


def read_kernels(ptx: str) -> dict[str, Kernel]:
    """All kernels of a module by name."""
    ptx = COMMENT.sub("", ptx).split("\n\t.section")[0]
    outside = {name: int(align or 1) for align, _, name, size in VARIABLE.findall(ptx.split(".entry")[0]) if size == ""}
    kernels = {}
    for found in ENTRY.finditer(ptx):
        kernel = Kernel(found[1])
        for align, kind, name, count in PARAMETER.findall(found[2]):
            size = BITS[kind] // 8 * int(count or 1)
            at = _aligned(kernel.parameter_bytes, int(align or BITS[kind] // 8))
            kernel.parameters[name] = (at, size)
        for name in outside:
            kernel.dynamic = name
        _read_body(kernel, _body(ptx, found.end()))
        kernels[kernel.name] = kernel
    return kernels


def _body(ptx: str, start: int) -> str:
    depth = 1
    for place in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if place[0] == "{" else -1
        if depth == 0:
            return ptx[start : start + place.start()]
    raise ValueError("a kernel without an end")


def _read_body(kernel: Kernel, body: str) -> None:
    at = 0
    while at < len(body):
        label = LABEL.match(body, at)
        if label:
            kernel.labels[label[1]] = len(kernel.code)
            at = label.end()
            continue
        if body[at] in "{} \t\n;":
            at += 1
            continue
        end = body.find(";", at)
        line = body.find("\n", at)
        if body.startswith((".loc", ".file", ".pragma"), at) and line > 0:
            at = line
            continue
        _read_statement(kernel, body[at : end if end >= 0 else len(body)].strip())
        at = end + 1 if end >= 0 else len(body)


def _read_statement(kernel: Kernel, text: str) -> None:
    declared = DECLARED.fullmatch(text)
    variable = VARIABLE.fullmatch(text)
    if declared:
        for name in declared[2].split(","):
            _declare(kernel, declared[1], name.strip())
    elif variable:
        align, kind, name, count = variable.groups()
        at = _aligned(kernel.static_bytes, int(align or BITS[kind] // 8))
        kernel.shared[name] = at
        kernel.static_bytes = at + BITS[kind] // 8 * int(count or 1)
    else:
        kernel.code.append(_instruction(text))


def _declare(kernel: Kernel, kind: str, name: str) -> None:
    counted = re.fullmatch(r"(%\w+)<(\d+)>", name)
    names = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
    for each in names:
        if kernel.registers.setdefault(each, BITS[kind]) != BITS[kind]:
            raise ValueError(f"{each} is declared with two sizes")


def _instruction(text: str) -> Instruction:
    guard = GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    opcode, _, operands = rest.partition(" ") if " " in rest.split("\t")[0] else rest.partition("\t")
    return Instruction(
        tuple(opcode.strip().split(".")),
        tuple(_operand(part) for part in _parts(operands)),
        (guard[2], guard[1] == "!") if guard else None,
        " ".join(text.split()),
    )


def _parts(text: str) -> list[str]:
    """Cut at the commas outside brackets; of `a|b`, both."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character in ",|" and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(part) for part in _parts(text[1:-1])))
    if text[0] == "[":
        place, *further = _parts(text[1:-1])
        base, _, offset = place.partition("+")
        coordinates = _operand(further[0]).parts if further else ()
        return Address(_operand(base.strip()), int(offset or 0), coordinates)
    if text[0].isdigit() or text[0] == "-":
        return Immediate(text)
    return Name(text)


def _aligned(offset: int, to: int) -> int:
    return (offset + to - 1) // to * to
