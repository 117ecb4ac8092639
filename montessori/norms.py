"""Squared norms of the gradients of a batch's examples, most of them without the gradient (clipping, Eq. 1).

‖dYᵀX‖² = Σ_st (x_s · x_t)(dy_s · dy_t): for texts of few hundred tokens fewer operations than the product, and those of
all examples in one call. Dimensions: B examples, L rows of the longest, a weight [O, I].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from montessori.ops import SparseRows
from montessori.oracle import norm
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
    longest, (num_in, num_out) = int(use.offsets.diff().max()), (use.x.shape[1], use.dy.shape[1])
    if longest * (num_in + num_out) > num_in * num_out:
        shape = torch.Size((num_out, num_in))
        return torch.stack([norm(example_gradient(use, example, shape)).square() for example in range(size)])
    whole_x, whole_dy = (_Padded.of(rows, use.offsets, use.starts) for rows in (use.x, use.dy))
    tied = None if use.rows is None else _padded_rows(use.rows)

    def of(some: slice) -> Tensor:
        x, dy = whole_x.part(some), whole_dy.part(some)
        total = _sum(x.dot(x), dy.dot(dy), x, x)
        if tied is not None:
            # Of the embedding's rows, dY would have a 1 at the token's id.
            ids, rows = tied[0][some], tied[1].part(some)
            at_ids = dy.rows.gather(2, ids[:, None, :].expand(-1, dy.rows.shape[1], -1))
            total = total + 2 * _sum(x.dot(rows), at_ids, x, rows)
        return total

    total = _by_parts(of, size, longest)
    return total if use.rows is None else total + _of_rows(use.rows, size)


def _of_rows(table: SparseRows, size: int) -> Tensor:
    whole_ids, whole = _padded_rows(table)

    def of(some: slice) -> Tensor:
        ids, rows = whole_ids[some], whole.part(some)
        return _sum(rows.dot(rows), (ids[:, :, None] == ids[:, None, :]).to(rows.rows.dtype), rows, rows)

    return _by_parts(of, size, whole.rows.shape[1])


def _by_parts(of: Callable[[slice], Tensor], size: int, longest: int) -> Tensor:
    """What `of` gives for all examples, for as many at a time as _HELD allows."""
    step = max(1, _HELD // max(1, longest) ** 2)
    return torch.cat([of(slice(first, first + step)) for first in range(0, size, step)])


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
