"""Tile shapes of the GPU kernels: the one place where sizes are chosen.

A choice depends on the device, the dtypes and the shape of the parameter, never on the examples of a call, so that
an example has the same bits alone and in any batch. docs/kernels.md has the arithmetic behind the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1024  # of one program of the element-wise kernels


@dataclass(frozen=True)
class Tile:
    """Output tile (block_o, block_i) and step block_t along the sum, in elements.

    `hold`: exp_avg, exp_avg_sq and the q of a single set stay in registers while the examples pass; otherwise they are
    read again for each one, from the caches.
    """

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int
    hold: bool = True


# Float32 operands run outside the tensor cores ("ieee"), where more than this spills.
WIDE = Tile(64, 64, 16, 8, 2)
# From each capability on, of the tiles held in registers that compile without spills the one that reads least per
# operation.
NARROW = {
    (8, 0): Tile(128, 64, 32, 8, 3),
    (9, 0): Tile(128, 64, 64, 8, 3),
    (10, 0): Tile(128, 64, 64, 8, 3),
    (12, 0): Tile(128, 64, 32, 8, 3),
}
LEAST_CAPABILITY = min(NARROW)
# Rows whose width is no multiple of 16 are loaded element by element, for which larger tiles spill.
ALIGNED_WIDTH = 16
ODD = Tile(64, 64, 32, 8, 3)
# Compared by the benchmark on every device, beside the choice.
RIVALS = (
    Tile(64, 64, 64, 4, 3),
    Tile(128, 64, 32, 8, 3),
    Tile(128, 64, 64, 8, 3),
    Tile(128, 128, 64, 8, 3, hold=False),
    Tile(128, 128, 32, 8, 4, hold=False),
    Tile(128, 128, 64, 16, 3, hold=False),
)
LOGITS = Tile(64, 128, 64, 8, 3)
WORD_BLOCKS = 32  # that a program of the cross-entropy goes through: splits then depend on the vocabulary alone
LOGITS_WIDE = Tile(32, 64, 16, 4, 2)


@lru_cache(maxsize=32)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=32)
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_tile(operand: Tensor, shape: Sequence[int]) -> Tile:
    """Tile of the fused linear kernel for products of tensors like `operand`, for a weight of this shape."""
    if operand.dtype is torch.float32:
        return WIDE
    if any(width % ALIGNED_WIDTH for width in shape):
        return ODD
    return held_tile(capability(operand.device))


def held_tile(kind: tuple[int, int]) -> Tile:
    """Tile for narrow operands on this compute capability, LEAST_CAPABILITY or later."""
    return NARROW[max(known for known in NARROW if known <= kind)]


def choose_logits_tile(operand: Tensor) -> Tile:
    """Tile of the cross-entropy kernels: (rows, words) and step along the features."""
    return LOGITS_WIDE if operand.dtype is torch.float32 else LOGITS


def examples_per_program(num_tiles: int, num_examples: int, device: torch.device) -> int:
    """Examples that one program takes, so that small parameters still fill the device about twice."""
    splits = max(1, -(-2 * num_processors(device) // max(1, num_tiles)))
    return max(1, -(-num_examples // splits))
