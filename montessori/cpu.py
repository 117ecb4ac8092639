"""The compiled CPU kernels behind `montessori.ops`, impl="cpu". Dimensions as there.

Arguments are trusted here; `montessori.ops` has checked them.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from montessori.errors import ArgumentError
from montessori.products import float32_precision, torch_rounds_products
from montessori.spans import Spans, packed_layout
from montessori.steps import OptimizerStep, SGDStep

if TYPE_CHECKING:
    from montessori.ops import SparseRows

LIBRARY = Path(__file__).with_name("_cpu.so")
# Values of MONTESSORI_SIMD.
KERNELS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles drawn of a stratum: two, so that the variance within it can be seen.
DRAWN_PER_STRATUM = 2


def unavailable() -> str | None:
    """Why the library cannot be used in this process, None when it is loaded."""
    return "MONTESSORI_NO_KERNELS is set" if os.environ.get("MONTESSORI_NO_KERNELS") else load_error()


def missing() -> str | None:
    """Why there are no kernels though nobody has switched them off, None when that is not so."""
    return None if os.environ.get("MONTESSORI_NO_KERNELS") else load_error()


@lru_cache(maxsize=1)
def load_error() -> str | None:
    """Why the library cannot be loaded, None when it is."""
    if not LIBRARY.exists():
        return "the CPU kernels were not built (install from source with a C++ compiler and --no-build-isolation)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    torch.library.register_fake("montessori::linear_scores", _fake_linear_scores)
    torch.library.register_fake("montessori::example_squares", _fake_example_squares)
    torch.library.register_fake("montessori::tile_norms", _fake_tile_norms)
    torch.library.register_fake("montessori::dense_scores", _fake_dense_scores)
    torch.library.register_fake("montessori::cross_entropy_", _fake_cross_entropy)
    torch.library.register_fake("montessori::step_", _fake_step)
    return None


def tiling() -> int:
    """What tells how this processor's caches and kernel cut weights: a checksum of the tiles of many heights."""
    counts = [torch.ops.montessori.tile_norms(torch.zeros(1, rows, 192)).shape[1] for rows in range(64, 2049, 64)]
    return zlib.crc32(repr(counts).encode())


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why these arguments are not for this implementation, None when they are."""
    reason = unavailable()
    if reason is not None:
        return reason
    simd = os.environ.get("MONTESSORI_SIMD")
    if simd and simd not in KERNELS:
        raise ArgumentError(f"MONTESSORI_SIMD={simd}: expected one of {', '.join(KERNELS)}, or unset it")
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, got a tensor on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"it computes in float32 from float32, bfloat16 or float16, got {tensor.dtype}"
    return None


@dataclass(frozen=True)
class TileSample:
    """Tiles of a weight with q of `shape` [K, O, I], drawn by strata: `tiles` int64 [n], of which
    bounds[h]..bounds[h+1]-1 stand for the population[h] tiles of stratum h."""

    shape: tuple[int, ...]
    tiles: Tensor
    bounds: Tensor
    population: Tensor

    @classmethod
    def draw(cls, q: Tensor, sample: float, seed: int) -> TileSample:
        """A share of about `sample` of the tiles of the weight that q [K, O, I] belongs to.

        An update is bounded, so a tile can matter as much as its part of q is large. Strata of tiles of
        similar norm have equal sums of norms: what is large is always there, the small stand for each other.
        """
        norms = torch.ops.montessori.tile_norms(q.contiguous())
        share = (norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)).sum(0)
        order = share.argsort(descending=True, stable=True)
        drawn = min(len(order), max(DRAWN_PER_STRATUM, round(len(order) * sample)))
        sizes = [DRAWN_PER_STRATUM] * (drawn // DRAWN_PER_STRATUM) or [0]
        sizes[-1] += drawn - sum(sizes)
        edges = _edges(share[order].tolist(), sizes)
        generator = torch.Generator().manual_seed(seed)
        tiles = []
        for (low, high), size in zip(pairwise(edges), sizes, strict=True):
            chosen = torch.randperm(high - low, generator=generator, device="cpu")[:size]
            tiles.append(order[low:high][chosen].sort().values)
        population = torch.tensor(edges, device="cpu").diff()
        return cls(tuple(q.shape), torch.cat(tiles), torch.tensor([0, *accumulate(sizes)], device="cpu"), population)


def _edges(shares: list[float], sizes: list[int]) -> list[int]:
    """Bounds of strata with nearly equal sums of `shares`, largest first, each with its size of tiles at least."""
    edges, left, needed = [0], sum(shares), sum(sizes)
    for h, size in enumerate(sizes[:-1]):
        needed -= size
        target, part, high = left / (len(sizes) - h), 0.0, edges[-1]
        while high < len(shares) - needed and (high < edges[-1] + size or part + shares[high] / 2 < target):
            part += shares[high]
            high += 1
        left -= part
        edges.append(high)
    return [*edges, len(shares)]


def linear_influence(
    x: Tensor,
    dy: Tensor,
    spans: Spans,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    rows: SparseRows | None,
) -> Tensor:
    """Eq. 5 tile by tile; see `montessori.ops.linear_influence`."""
    table = _sorted_rows(rows) if rows is not None else (None, None, None)
    call = _prepared(q, exp_avg, exp_avg_sq, param, step)
    batch = (x.contiguous(), dy.contiguous(), *packed_layout(spans, x.shape[0]))
    scores, _ = torch.ops.montessori.linear_scores(
        *batch, *call.state, *table, None, None, None, *call.constants, _round_products()
    )
    return scores * call.scale


def sampled_linear_influence(
    x: Tensor,
    dy: Tensor,
    spans: Spans,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    sample: TileSample,
) -> tuple[Tensor, Tensor]:
    """Estimates of Σ q·(Δ(g) − Δ(0)) from the tiles of `sample`, and their variances."""
    call = _prepared(q, exp_avg, exp_avg_sq, param, step)
    batch = (x.contiguous(), dy.contiguous(), *packed_layout(spans, x.shape[0]))
    chosen = (sample.tiles, sample.bounds, sample.population)
    scores, variance = torch.ops.montessori.linear_scores(
        *batch, *call.state, None, None, None, *chosen, *call.constants, _round_products()
    )
    return scores * call.scale, variance * call.scale**2


def example_squares(x: Tensor, dy: Tensor, spans: Spans) -> Tensor:
    """‖dYᵀX‖² of each example, float64 [B], by the products of its tokens with each other in float32."""
    return torch.ops.montessori.example_squares(x.contiguous(), dy.contiguous(), *packed_layout(spans, x.shape[0]))


def adam_influence(
    grad: Tensor | None,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
) -> Tensor:
    """Eq. 3 for ready gradients [B, *shape], or with None for one gradient 0."""
    call = _prepared(q.reshape(q.shape[0], param.numel()), exp_avg, exp_avg_sq, param, step)
    flat = None if grad is None else grad.reshape(grad.shape[0], param.numel()).contiguous()
    return torch.ops.montessori.dense_scores(flat, *call.state, *call.constants) * call.scale


def adam_step_(
    param: Tensor,
    source: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: OptimizerStep,
) -> None:
    """param = source + Δ(grad) in one pass; see `montessori.ops.adam_step_`."""
    moments, constants = _folded(exp_avg, exp_avg_sq, step)
    torch.ops.montessori.step_(param, source.contiguous(), grad.contiguous(), *moments, step.lr, *constants)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Losses of the rows of `logits` float32 [n, V], float64 [n]; logits become their gradients.

    targets int64 [n], weights float32 [n]: row i becomes weights[i] · (softmax − one-hot).
    """
    return torch.ops.montessori.cross_entropy_(logits, targets, weights)


def _round_products() -> bool:
    """Whether float32 products may be those of bfloat16: only where torch's switch allows it and torch's own are."""
    return float32_precision() == "medium" and torch_rounds_products()


@dataclass(frozen=True)
class _Prepared:
    """Arguments of an operator, whose result times `scale` is the score."""

    state: tuple[Tensor | None, ...]  # q, exp_avg, exp_avg_sq, param
    constants: tuple[float, ...]  # a1, a2, s1, s2, eps, decay, on_param, on_exp_avg
    scale: float


def _prepared(
    q: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, param: Tensor, step: OptimizerStep
) -> _Prepared:
    moments, constants = _folded(exp_avg, exp_avg_sq, step)
    return _Prepared((q.contiguous(), *moments, param.contiguous()), constants, -step.lr)


def _folded(
    exp_avg: Tensor | None, exp_avg_sq: Tensor | None, step: OptimizerStep
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[float, ...]]:
    """The moments that are read, and a1, a2, s1, s2, eps, decay, on_param, on_exp_avg: Δ is −lr times the rest."""
    if isinstance(step, SGDStep):
        buffer = exp_avg if step.step > 1 else None
        on_grad, on_buffer = step.line(buffer is not None)
        constants = (0.0, on_grad, 0.0, 0.0, 0.0, 0.0, step.weight_decay * on_grad, on_buffer)
        return (None if buffer is None else buffer.contiguous(), None), constants
    if exp_avg is None or exp_avg_sq is None:
        raise TypeError("an AdamWStep needs exp_avg and exp_avg_sq, got None")
    decay, on_param = (0.0, step.weight_decay) if step.decoupled else (step.weight_decay, 0.0)
    return (exp_avg.contiguous(), exp_avg_sq.contiguous()), (*step.folded, decay, on_param, 0.0)


def _sorted_rows(rows: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    """Ids sorted within each example, so that a tile finds its rows by bisection."""
    counts = rows.offsets.diff()
    example = torch.repeat_interleave(torch.arange(counts.numel(), device="cpu"), counts)
    by_id = rows.ids.argsort(stable=True)
    order = by_id[example[by_id].argsort(stable=True)]
    return rows.ids[order], rows.grad[order].contiguous(), rows.offsets.contiguous()


def _fake_linear_scores(
    x: Tensor, dy: Tensor, offsets: Tensor, positions: Tensor | None, q: Tensor, exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None, param: Tensor | None, row_ids: Tensor | None, row_grad: Tensor | None,
    row_offsets: Tensor | None, tiles: Tensor | None, bounds: Tensor | None, population: Tensor | None, a1: float,
    a2: float, s1: float, s2: float, eps: float, decay: float, on_param: float, on_exp_avg: float,
    round_products: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (offsets.shape[0] - 1, q.shape[0])
    return q.new_empty(shape, dtype=torch.float64), q.new_empty(shape, dtype=torch.float64)


def _fake_example_squares(x: Tensor, dy: Tensor, offsets: Tensor, positions: Tensor | None) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, dtype=torch.float64)


def _fake_tile_norms(q: Tensor) -> Tensor:
    # How many tiles there are is the processor's matter.
    return q.new_empty(q.shape[0], torch.library.get_ctx().new_dynamic_size(), dtype=torch.float64)


def _fake_dense_scores(
    grad: Tensor | None, q: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, param: Tensor | None,
    a1: float, a2: float, s1: float, s2: float, eps: float, decay: float, on_param: float, on_exp_avg: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(grad.shape[0] if grad is not None else 1, q.shape[0], dtype=torch.float64)


def _fake_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float64)


def _fake_step(
    param: Tensor, source: Tensor, grad: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, lr: float,
    a1: float, a2: float, s1: float, s2: float, eps: float, decay: float, on_param: float, on_exp_avg: float,
) -> None:  # fmt: skip
    return None
