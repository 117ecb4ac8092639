"""Where the rows of each example lie among those of an activation: packed, or with padding between them."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# First row and the one after the last, of each example.
Spans = list[tuple[int, int]]


def spans_of(offsets: Tensor, starts: Tensor | None = None) -> Spans:
    """Spans of examples with offsets[b+1] − offsets[b] rows each (int64 [B+1]), from starts[b] on (int64 [B]);
    without `starts` one after the other."""
    bounds = offsets.tolist()
    if starts is None:
        return list(pairwise(bounds))
    lengths = [high - low for low, high in pairwise(bounds)]
    return [(start, start + length) for start, length in zip(starts.tolist(), lengths, strict=True)]


def packed_layout(spans: Spans, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """Offsets int64 [B+1] of the examples' rows once packed, and which of the `num_rows` rows they are, int64 [T];
    None where they are all of them in order."""
    ends = torch.tensor(spans, dtype=torch.int64, device="cpu").reshape(-1, 2)
    counts = ends[:, 1] - ends[:, 0]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shift = ends[:, 0] - offsets[:-1]
    total = int(offsets[-1])
    if total == num_rows and not bool(shift[counts > 0].any()):
        return offsets, None
    return offsets, torch.arange(total, device="cpu") + shift.repeat_interleave(counts)


@lru_cache(maxsize=64)
def spans_on(spans: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Spans as int64 [B, 2] on a device. The layers of a batch share them: copying waits for the device."""
    return torch.tensor(spans, dtype=torch.int64, device=device).reshape(-1, 2)


@lru_cache(maxsize=64)
def owners_on(spans: tuple[tuple[int, int], ...], num_rows: int, device: torch.device) -> Tensor:
    """Which example each of `num_rows` rows belongs to, int64 [N] on a device; B of them where it is padding."""
    owners = torch.full((num_rows,), len(spans), dtype=torch.int64, device="cpu")
    for example, (low, high) in enumerate(spans):
        owners[low:high] = example
    return owners.to(device)


@lru_cache(maxsize=64)
def steps_on(count: int, size: int, device: torch.device) -> Tensor:
    """Offsets int64 [count + 1] of parts of one size, on a device."""
    return torch.arange(count + 1, device=device) * size
