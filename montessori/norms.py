"""Squared norms of the gradients of a batch's examples, most of them without the gradient (clipping, Eq. 1).

‖dYᵀX‖² = Σ_st (x_s · x_t)(dy_s · dy_t): for texts of few hundred tokens fewer operations than the product, and those of
all examples in one call. Dimensions: B examples, L rows of the longest, a weight [O, I].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from montessori import cpu
from montessori.ops import SparseRows
from montessori.oracle import norm
from montessori.spans import owners_on, spans_of
from montessori.uses import DenseUse, ExpertsUse, LinearUse, RestUse, RowsUse, Use, example_gradient

# Values of [examples, L, L] at a time.
_HELD = 1 << 24


@dataclass
class NormSink:
    """A sink of `Capture`: the squared norm of every parameter's gradient of each of `size` examples, float64 [B] on
    the `device`."""

    size: int
    device: torch.device
    squares: dict[str, Tensor] = field(default_factory=dict)

    def use(self, name: str, use: Use | RestUse) -> None:
        self._of(name).add_(squared_norms(use, self.size).to(self.device))

    def part(self, name: str, first: int, use: LinearUse, _rows: slice) -> None:
        count = use.offsets.numel() - 1
        self._of(name)[first : first + count] += squared_norms(use, count).to(self.device)

    def absent(self, name: str) -> None:
        self._of(name)

    def _of(self, name: str) -> Tensor:
        return self.squares.setdefault(name, torch.zeros(self.size, dtype=torch.float64, device=self.device))


def squared_norms(use: Use | RestUse, size: int, impl: str = "auto") -> Tensor:
    """‖g_b‖² of a parameter for each of `size` examples, float64 [B] on the parameter's device; of a rest, what it adds
    to that of the parts. `impl` as in `montessori.ops`; kernels of a GPU there are none."""
    if isinstance(use, DenseUse):
        # Rows first, in the gradient's precision: a float32 sum over a large matrix is off by per cents.
        width = use.grad.shape[-1] if use.grad.dim() > 1 else 1
        rows = torch.linalg.vector_norm(use.grad.reshape(size, -1, width), dim=-1)
        return rows.double().square().sum(1)
    if isinstance(use, ExpertsUse):
        return torch.stack([_of_matrix(part, size, impl) for part in use.parts.values()]).sum(0)
    if isinstance(use, RowsUse):
        return _of_rows(use.rows, size)
    if isinstance(use, RestUse):
        return _of_rest(use, size)
    return _of_matrix(use, size, impl)


@dataclass(frozen=True)
class _Padded:
    """Rows [B, L, F] of all examples with padding behind them, of whatever values; `real` is bool [B, L]."""

    rows: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: Tensor, offsets: Tensor, starts: Tensor | None = None) -> _Padded:
        spans = tuple(spans_of(offsets, starts))
        stride = len(rows) // len(spans)
        whole = len(rows) == stride * len(spans)
        if stride and whole and all(low == number * stride for number, (low, _) in enumerate(spans)):
            # As the model had them: nothing is copied.
            return cls(_wide(rows).unflatten(0, (len(spans), stride)), _places_on(spans, stride, rows.device)[1])
        longest = max(max(high - low for low, high in spans), 1)
        places, real = _places_on(spans, longest, rows.device)
        return cls(_wide(rows)[places.clamp(max=max(len(rows) - 1, 0))], real)

    def part(self, examples: slice) -> _Padded:
        return _Padded(self.rows[examples], self.real[examples])

    def dot(self, other: _Padded) -> Tensor:
        """x_s · y_t, [B, L, L']."""
        return self.rows @ other.rows.mT


def _of_matrix(use: LinearUse, size: int, impl: str) -> Tensor:
    if use.rows is None and not int(use.offsets[-1]):
        # No token of any example came here.
        return torch.zeros(size, dtype=torch.float64, device=use.x.device)
    longest, (num_in, num_out) = int(use.offsets.diff().max()), (use.x.shape[1], use.dy.shape[1])
    compiled = impl in ("auto", "cpu") and cpu.unsupported(use.x, use.dy) is None
    # Of two tokens the kernel takes one product, where torch takes both.
    if longest * (num_in + num_out) > (2 if compiled else 1) * num_in * num_out:
        shape = torch.Size((num_out, num_in))
        return torch.stack([norm(example_gradient(use, example, shape)).square() for example in range(size)])
    if compiled:
        total = cpu.example_squares(use.x, use.dy, spans_of(use.offsets, use.starts))
    else:
        x, dy = _padded(use)
        total = _by_parts(lambda some: _of_products(x.part(some), dy.part(some)), size, longest)
    if use.rows is None:
        return total
    return total + 2 * _with_rows(use, use.rows, size) + _of_rows(use.rows, size)


def _of_products(x: _Padded, dy: _Padded) -> Tensor:
    return _sum(x.dot(x), dy.dot(dy), x, x)


def _with_rows(use: LinearUse, table: SparseRows, size: int) -> Tensor:
    """⟨dYᵀX, G⟩ with the gradient G of an embedding's rows: dY of which would have a 1 at the token's id."""
    whole_x, whole_dy = _padded(use)
    whole_ids, whole_rows = _padded_rows(table)

    def of(some: slice) -> Tensor:
        x, ids, rows = whole_x.part(some), whole_ids[some], whole_rows.part(some)
        dy = whole_dy.rows[some]
        at_ids = dy.gather(2, ids[:, None, :].expand(-1, dy.shape[1], -1))
        return _sum(x.dot(rows), at_ids, x, rows)

    return _by_parts(of, size, whole_x.rows.shape[1])


def _padded(use: LinearUse) -> tuple[_Padded, _Padded]:
    return _Padded.of(use.x, use.offsets, use.starts), _Padded.of(use.dy, use.offsets, use.starts)


def _of_rows(table: SparseRows, size: int) -> Tensor:
    """In time and memory in proportion to the tokens; sums by segments, whose order no device changes."""
    if not len(table.ids):
        return torch.zeros(size, dtype=torch.float64)
    owners = owners_on(tuple(spans_of(table.offsets)), len(table.ids), table.ids.device)
    keys, order = (owners * (int(table.ids.max()) + 1) + table.ids).sort(stable=True)
    counts = keys.unique_consecutive(return_counts=True)[1]
    rows = table.grad.to(torch.promote_types(table.grad.dtype, torch.float32))[order]
    sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0)
    squares = torch.linalg.vector_norm(sums, dim=1).double().square()
    num_ids = torch.bincount(owners[order[counts.cumsum(0) - 1]], minlength=size)
    return torch.segment_reduce(squares, "sum", lengths=num_ids, axis=0)


def _of_rest(use: RestUse, size: int) -> Tensor:
    table = use.rows
    if table is None:
        return torch.zeros(size, dtype=torch.float64)
    total = _of_rows(table, size)
    for example, (low, high) in enumerate(pairwise(table.offsets.tolist())):
        part = use.parts[example]
        of_parts = part.grad[torch.searchsorted(part.ids, table.ids[low:high])]
        total[example] += 2 * (of_parts.double() * table.grad[low:high].double()).sum()
    return total


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


@lru_cache(maxsize=64)
def _places_on(spans: tuple[tuple[int, int], ...], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of each example and those after them, int64 [B, L], and which are its own, bool [B, L], on a device."""
    bounds, steps = torch.tensor(spans, device="cpu"), torch.arange(length, device="cpu")
    places = bounds[:, :1] + steps
    return places.to(device), (places < bounds[:, 1:]).to(device)


def _wide(tensor: Tensor) -> Tensor:
    """float16 would overflow. Of bfloat16, rounded products of tokens with tokens say a norm to better than its
    gradient is known: they are many, and rounded apart."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor
