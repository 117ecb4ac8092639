"""The compiled CPU kernels behind `montessori.ops`, impl="cpu". Dimensions as there.

Arguments are trusted here; `montessori.ops` has checked them.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from montessori.steps import AdamWStep, OptimizerStep, SGDStep

if TYPE_CHECKING:
    from montessori.ops import SparseRows

LIBRARY = Path(__file__).with_name("_cpu.so")
DOT_ELEMENTS = 1 << 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why the library cannot be used in this process, None when it is loaded."""
    if os.environ.get("MONTESSORI_NO_KERNELS"):
        return "MONTESSORI_NO_KERNELS is set"
    if not LIBRARY.exists():
        return "the CPU kernels were not built (install from source with a C++ compiler and --no-build-isolation)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    torch.library.register_fake("montessori::linear_scores", _fake_linear_scores)
    return None


def unsupported(step: OptimizerStep, *tensors: Tensor | None) -> str | None:
    """Why these arguments are not for this implementation, None when they are."""
    reason = unavailable()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, got a tensor on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"it computes in float32 from float32, bfloat16 or float16, got {tensor.dtype}"
    if isinstance(step, AdamWStep) and not step.decoupled and step.weight_decay:
        return "it has no Adam with L2 weight decay"
    return None


def linear_influence(
    x: Tensor,
    dy: Tensor,
    bounds: list[int],
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    rows: SparseRows | None,
) -> Tensor:
    """Eq. 5 tile by tile; see `montessori.ops.linear_influence`."""
    table = _sorted_rows(rows) if rows is not None else (None, None, None)
    arguments = (x.contiguous(), dy.contiguous(), torch.tensor(bounds), q.contiguous())
    flat_q = q.flatten(1)
    if isinstance(step, SGDStep):
        slope, at_zero = _sgd_line(step, exp_avg, param)
        scores = torch.ops.montessori.linear_scores(*arguments, None, None, *table, 0.0, 0.0, 0.0, 0.0, 0.0)
        return scores * slope + _dot(flat_q, at_zero)
    if exp_avg is None or exp_avg_sq is None:
        raise TypeError("an AdamWStep needs exp_avg and exp_avg_sq, got None")
    scores = torch.ops.montessori.linear_scores(
        *arguments,
        exp_avg.contiguous(),
        exp_avg_sq.contiguous(),
        *table,
        *step.folded,
        step.eps,
    )
    scores = scores * -step.lr
    if step.weight_decay:
        scores -= _dot(flat_q, param) * (step.lr * step.weight_decay)
    return scores


def _dot(flat_q: Tensor, values: Tensor) -> Tensor:
    """Σ q·values, float64 [K]; a cache-sized part is widened at a time."""
    total = torch.zeros(flat_q.shape[0], dtype=torch.float64)
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), DOT_ELEMENTS):
        part = slice(start, start + DOT_ELEMENTS)
        total += flat_q[:, part].double() @ flat[part].double()
    return total


def _sgd_line(step: SGDStep, buffer: Tensor | None, param: Tensor) -> tuple[float, Tensor]:
    """Δ(g) = slope · g + Δ(0): the slope, and Δ(0) of the parameter's shape."""
    buffered = step.step > 1 and buffer is not None
    on_grad, on_buffer = step.line(buffered)
    at_zero = param.float() * (step.weight_decay * on_grad)
    if on_buffer and buffer is not None:
        at_zero = at_zero + buffer.float() * on_buffer
    return -step.lr * on_grad, at_zero * -step.lr


def _sorted_rows(rows: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    """Ids sorted within each example, so that a tile finds its rows by bisection."""
    counts = rows.offsets.diff()
    example = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    by_id = rows.ids.argsort(stable=True)
    order = by_id[example[by_id].argsort(stable=True)]
    return rows.ids[order], rows.grad[order].contiguous(), rows.offsets.contiguous()


def _fake_linear_scores(
    x: Tensor, dy: Tensor, offsets: Tensor, q: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None,
    row_ids: Tensor | None, row_grad: Tensor | None, row_offsets: Tensor | None,
    a1: float, a2: float, s1: float, s2: float, eps: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(offsets.shape[0] - 1, q.shape[0], dtype=torch.float64)
