"""Compiles every Triton kernel ahead of time for the capabilities in argv and prints its resources as JSON.

Runs in a process of its own, with a cache of its own. No GPU is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from montessori.kernels.triton import cross_entropy, elementwise, embedding, linear, partials, rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from montessori import tiles

FLOAT_POINTERS = ("param", "source", "partial", "highest", "total", "target_logit", "lse", "scale", "sums", "base")
FLOATS = ("a1", "a2", "s1", "s2", "eps", "decay", "l2", "lr")
SGD = {"ADAM": False, "MOMENT": False, "DECAY": False, "exp_avg_ptr": None, "exp_avg_sq_ptr": None}
WIDTHS = {"O", "I", "H", "F", "size"}
ADAMW = {"ADAM": True, "MOMENT": True, "DECAY": True, "L2": False}


def pointer_types(operand: str, state: str) -> dict[str, str]:
    """Element type of every pointer argument by its name."""
    types = dict.fromkeys(("x", "dy", "grad", "hidden", "weight", "row_grad", "rows", "times"), operand)
    types |= dict.fromkeys(("q", "exp_avg", "exp_avg_sq"), state)
    types |= dict.fromkeys(FLOAT_POINTERS, "fp32")
    types |= dict.fromkeys(("offsets", "spans", "order", "starts", "ids", "targets", "base_at"), "i64")
    return types | {"row_ids": "i32", "row_bounds": "i32", "scores": "fp64"}


class Entry(NamedTuple):
    """A kernel as `montessori.gpu` launches it; `odd`: its rows have widths that are not divisible by 16."""

    kernel: Any
    types: tuple[str, str]
    constants: dict
    warps: int
    stages: int
    odd: bool = False


def kernels(capability: int) -> dict[str, Entry]:
    tile = tiles.held_tile(divmod(capability, 10))
    products = {
        "linear bf16": linear_entry(tile, "bf16", "fp32"),
        "linear bf16, tied": linear_entry(tile, "bf16", "fp32", TIED=True),
    }
    if capability == 89:
        # As of 8.0 but for the scheduling.
        return products
    products |= {
        "linear bf16, five sets": linear_entry(tile, "bf16", "fp32", SETS=5),
        "linear bf16, odd widths": linear_entry(tiles.ODD, "bf16", "fp32", TIED=True)._replace(odd=True),
    }
    if capability != 90:
        return products
    # What one capability makes of the others tells enough.
    more = {
        "linear bf16, SGD": linear_entry(tile, "bf16", "fp32", **SGD),
        "linear bf16, twenty sets": linear_entry(tile, "bf16", "fp32", SETS=20),
        "linear fp32": linear_entry(tiles.WIDE, "fp32", "fp32"),
    }
    return products | more | other_kernels()


def linear_entry(tile: tiles.Tile, operand: str, state: str, **changes: Any) -> Entry:
    constants = {
        "SETS": 1, **ADAMW, "TIED": False, "HOLD": tile.hold, "PRECISION": "ieee" if operand == "fp32" else "tf32",
        "BLOCK_O": tile.block_o, "BLOCK_I": tile.block_i, "BLOCK_T": tile.block_t, "BLOCK_R": 16, "GROUP": 8, **changes,
    }  # fmt: skip
    constants["SETS_PADDED"] = triton.next_power_of_2(constants["SETS"])
    if not constants["TIED"]:
        constants |= dict.fromkeys(("row_ids_ptr", "row_grad_ptr", "row_bounds_ptr"))
    return Entry(linear.linear_influence_kernel, (operand, state), constants, tile.num_warps, tile.num_stages)


def other_kernels() -> dict[str, Entry]:
    logits = {"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_H": 64, "PRECISION": "tf32"}
    plain = {"SETS": 1, "BLOCK": tiles.BLOCK_ELEMENTS}
    without_decay = {name: ADAMW[name] for name in ("ADAM", "MOMENT", "L2")}
    sums = {"TIMES": True, "SCALED": True, "BLOCK_T": 32, "BLOCK_F": 128}
    step = {"ADAM": True, "MOMENT": True, "BLOCK": tiles.BLOCK_ELEMENTS}
    return {
        "elementwise": Entry(elementwise.adam_influence_kernel, ("fp32", "fp32"), {**plain, **ADAMW}, 4, 1),
        "step": Entry(elementwise.adam_step_kernel, ("fp32", "fp32"), step, 4, 1),
        "embedding": Entry(
            embedding.row_changes_kernel, ("bf16", "fp32"), {**plain, **without_decay, "BASE": True}, 4, 1
        ),
        "cross entropy": Entry(cross_entropy.linear_cross_entropy_kernel, ("bf16", "fp32"), logits, 8, 3),
        "logits gradient": Entry(cross_entropy.logits_gradient_kernel, ("bf16", "fp32"), logits, 8, 3),
        "partials": Entry(partials.sum_partials_kernel, ("fp32", "fp32"), {"BLOCK": 512}, 4, 1),
        "row sums": Entry(rows.example_sums_kernel, ("bf16", "fp32"), sums, 4, 1),
    }


def kinds(kernel) -> set[str]:
    """Arguments by whose divisibility the launcher compiles variants: pointers, and the widths of rows."""
    looked_at = {p.name for p in kernel.params if not (p.do_not_specialize or p.do_not_specialize_on_alignment)}
    return {name for name in looked_at if name.endswith("_ptr") or name in WIDTHS}


def compile_kernel(entry: Entry, capability: int) -> dict:
    kernel, types, constants, warps, stages, odd = entry
    pointers, divisible = pointer_types(*types), kinds(kernel) - (WIDTHS if odd else set())
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{pointers[name.removesuffix('_ptr')]}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name in divisible:
            aligned[(position,)] = [["tt.divisibility", 16]]
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=at, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return resources(compiled) | {"kinds": sorted(kinds(kernel))}


def resources(compiled) -> dict:
    """Registers, spilled bytes, shared memory, and which instructions the machine code has; `copies` to shared memory
    are asynchronous, of 16 bytes by each thread."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    matrix = sorted({word for word in ("HGMMA", "HMMA", "UTCHMMA") if re.search(rf"\b{word}\b", code)})
    special = len(re.findall(r"\bMUFU\.(?:RSQ|SQRT|RCP)\b", code))
    used = {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}
    return used | {"matrix": matrix, "special": special, "copies": len(re.findall(r"\bLDGSTS\S*\.128\b", code))}


def _output(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    compiled = {
        capability: {name: compile_kernel(entry, int(capability)) for name, entry in kernels(int(capability)).items()}
        for capability in sys.argv[1:]
    }
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
