"""All instructions that are known, by their first word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import access, arithmetic, asynchronous, control, matrix  # noqa: F401  each registers its own
from .instructions import OPERATIONS, Mask, Step, row
from .machine import Split
from .text import Instruction

if TYPE_CHECKING:
    from .machine import Unit


def compile_instruction(unit: Unit, instruction: Instruction) -> Step:
    build = OPERATIONS.get(instruction.opcode[0])
    if build is None:
        raise NotImplementedError(f"`{instruction.text}`")
    step = build(unit, instruction)
    if instruction.guard is None:
        return step
    name, negated = instruction.guard
    predicate = row(unit, name)

    def guarded(mask: Mask) -> Any:
        chosen = ~predicate if negated else predicate
        if mask is not None:
            chosen = chosen & mask
        if not chosen.any():
            return None
        result = step(None if chosen.all() else chosen.copy())
        if type(result) is int and not (chosen if mask is None else chosen[mask]).all():
            return Split(chosen.copy(), result)
        return result

    return guarded
