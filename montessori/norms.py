"""Squared norms of the gradients of a batch's examples, most of them without the gradient (clipping, Eq. 1).

‖dYᵀX‖² = Σ_st (x_s · x_t)(dy_s · dy_t): for texts of few hundred tokens fewer operations than the product, and those of
all examples in one call. Dimensions: B examples, L rows of the longest, a weight [O, I].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from montessori.ops import SparseRows
from montessori.uses import DenseUse, ExpertsUse, LinearUse, RowsUse, Use, example_gradient

# Values of [examples, L, L] at a time.
_HELD = 1 << 24


def squared_norms(use: Use, size: int, shape: torch.Size) -> Tensor:
    """‖g_b‖² of a parameter of this `shape` for each of `size` examples, float64 [B] on the parameter's device."""
    if isinstance(use, DenseUse):
        # Rows first, in the gradient's precision: a float32 sum over a large matrix is off by per cents.
        rows = torch.linalg.vector_norm(use.grad.reshape(size, -1, use.grad.shape[-1]), dim=-1)
        return rows.double().square().sum(1)
    if isinstance(use, ExpertsUse):
        return torch.stack([_of_matrix(part, size) for part in use.parts.values()]).sum(0)
    if isinstance(use, RowsUse):
        return _of_rows(use.rows, size)
    return _of_matrix(use, size)


@dataclass(frozen=True)
class _Padded:
    """Rows [B, L, F] of all examples with padding behind them, of whatever values; `real` is bool [B, L]."""

    rows: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: Tensor, offsets: Tensor, starts: Tensor | None = None) -> _Padded:
        first, counts = (offsets[:-1] if starts is None else starts), offsets.diff()
        size, stride = len(counts), rows.shape[0] // len(counts)
        if stride and torch.equal(first, torch.arange(size) * stride) and rows.shape[0] == size * stride:
            # As the model had them: nothing is copied.
            return cls(_wide(rows).unflatten(0, (size, stride)), _is_real(counts, stride).to(rows.device))
        length = max(int(counts.max()), 1)
        places = (first[:, None] + torch.arange(length)).clamp(max=max(rows.shape[0] - 1, 0)).to(rows.device)
        return cls(_wide(rows)[places], _is_real(counts, length).to(rows.device))

    def part(self, examples: slice) -> _Padded:
        return _Padded(self.rows[examples], self.real[examples])

    def dot(self, other: _Padded) -> Tensor:
        """x_s · y_t, [B, L, L']."""
        return self.rows @ other.rows.mT


def _of_matrix(use: LinearUse, size: int) -> Tensor:
    counts = use.offsets.diff()
    longest, (num_in, num_out) = int(counts.max()), (use.x.shape[1], use.dy.shape[1])
    if longest * (num_in + num_out) > num_in * num_out:
        shape = torch.Size((num_out, num_in))
        grads = (example_gradient(use, example, shape) for example in range(size))
        return torch.stack([torch.linalg.vector_norm(grad, dim=1).double().square().sum() for grad in grads])
    x, dy = _Padded.of(use.x, use.offsets, use.starts), _Padded.of(use.dy, use.offsets, use.starts)
    step = max(1, _HELD // max(1, longest) ** 2)
    total = torch.cat([
        _sum(x.part(some).dot(x.part(some)), dy.part(some).dot(dy.part(some)), x.part(some), x.part(some))
        for some in (slice(first, first + step) for first in range(0, size, step))
    ])  # fmt: skip
    if use.rows is None:
        return total
    ids, rows = _padded_rows(use.rows)
    # Of the embedding's rows, dY would have a 1 at the token's id.
    at_ids = dy.rows.gather(2, ids[:, None, :].expand(-1, dy.rows.shape[1], -1))
    return total + 2 * _sum(x.dot(rows), at_ids, x, rows) + _of_rows(use.rows, size)


def _of_rows(table: SparseRows, size: int) -> Tensor:
    ids, rows = _padded_rows(table)
    step = max(1, _HELD // rows.rows.shape[1] ** 2)
    return torch.cat([
        _sum(one.dot(one), (ids[some, :, None] == ids[some, None, :]).to(one.rows.dtype), one, one)
        for some in (slice(first, first + step) for first in range(0, size, step))
        for one in [rows.part(some)]
    ])  # fmt: skip


def _padded_rows(table: SparseRows) -> tuple[Tensor, _Padded]:
    ids = _Padded.of(table.ids[:, None], table.offsets)
    return ids.rows.squeeze(-1), _Padded.of(table.grad, table.offsets)


def _sum(left: Tensor, right: Tensor, first: _Padded, second: _Padded) -> Tensor:
    """Σ_st left · right over the real rows of both, float64 [B]: padding may hold what is not finite."""
    real = first.real[:, :, None] & second.real[:, None, :]
    return torch.where(real, left.double() * right.double(), 0.0).sum((1, 2))


def _is_real(counts: Tensor, length: int) -> Tensor:
    return torch.arange(length) < counts[:, None]


def _wide(tensor: Tensor) -> Tensor:
    """float16 would overflow. Of bfloat16, rounded products of tokens with tokens say a norm to better than its
    gradient is known: they are many, and rounded apart."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor
