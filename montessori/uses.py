"""Per-example gradients of one parameter in the factored forms in which they are captured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from montessori.ops import SparseRows
from montessori.spans import Spans, owners_on, packed_layout, spans_of


@dataclass(frozen=True)
class LinearUse:
    """Gradient dYᵀX of a matrix [O, I]: x [n, I], dy [n, O], offsets int64 [B+1], and tied rows.

    With `starts`, int64 [B], x and dy still have padding: example b has as many rows, from row starts[b] on.
    """

    x: Tensor
    dy: Tensor
    offsets: Tensor
    rows: SparseRows | None = None
    starts: Tensor | None = None

    def packed(self) -> LinearUse:
        """The same without padding in x and dy."""
        _, positions = packed_layout(spans_of(self.offsets, self.starts), self.x.shape[0])
        if positions is None:
            return self
        positions = positions.to(self.x.device)
        return LinearUse(self.x[positions], self.dy[positions], self.offsets, self.rows)


@dataclass(frozen=True)
class RowsUse:
    """Gradient of an embedding table by its touched rows."""

    rows: SparseRows


@dataclass(frozen=True)
class DenseUse:
    """A ready gradient [B, *shape]."""

    grad: Tensor


@dataclass(frozen=True)
class Stack:
    """How the matrices [O, I] of `experts` lie in one parameter.

    By default [E, O, I]. In "rows" [E·O, I] they lie one below the other, in "columns" [O, I·E] column j of all experts
    before column j + 1 of any.
    """

    layout: str = "stacked"
    experts: int = 0

    def matrices(self, tensor: Tensor) -> Tensor:
        """A view [..., E, O, I] of a tensor [..., *shape of the parameter]."""
        if self.layout == "rows":
            return tensor.unflatten(-2, (self.experts, -1))
        if self.layout == "columns":
            return tensor.unflatten(-1, (-1, self.experts)).movedim(-1, -3)
        return tensor


@dataclass(frozen=True)
class ExpertsUse:
    """Gradient of the matrices in a `stack`: that of expert e is `parts[e]`, or zero where there is none."""

    parts: Mapping[int, LinearUse]
    stack: Stack = Stack()


@dataclass(frozen=True)
class TouchedRows:
    """Gradient `grad` [U, I] of the rows `ids`, sorted int64 [U], of one example."""

    ids: Tensor
    grad: Tensor

    def add(self, x: Tensor, dy: Tensor, rows: slice) -> None:
        """Add dYᵀX of x [n, I] and dy [n, O], the gradient of `rows` of the parameter."""
        low, here = 0, slice(None)
        if rows != slice(None):
            low = rows.start
            here = slice(*torch.searchsorted(self.ids, self.ids.new_tensor([low, rows.stop])).tolist())
        self.grad[here] += dy[:, self.ids[here] - low].to(self.grad.dtype).T @ x.to(self.grad.dtype)


# Receives (first example, gradient of these rows of the weight for the examples from there on, rows).
ReceivePart = Callable[[int, LinearUse, slice], None]


@dataclass(frozen=True)
class RestUse:
    """What remains of a matrix's gradient after its parts: `rows` [B examples] added to it, or nothing.

    `parts` holds, per example, the gradient of the rows in question from the parts already handed on. `again` hands
    them on once more, those of example b times factor b of its first argument, and returns their `parts`.
    """

    rows: SparseRows | None
    parts: Sequence[TouchedRows]
    again: Callable[[Tensor, ReceivePart], Sequence[TouchedRows]]


Use = LinearUse | RowsUse | DenseUse | ExpertsUse


def merge(uses: Sequence[Use]) -> Use | None:
    """One use that stands for all uses of a parameter (Eq. 1: they are summed before Δ).

    Returns None when gradients of different kinds come together, which no rule captures.
    """
    if len(uses) == 1:
        return uses[0]
    stacks = [use for use in uses if isinstance(use, ExpertsUse)]
    if stacks:
        alike = len(stacks) == len(uses) and len({use.stack for use in stacks}) == 1
        return _merge_experts(stacks) if alike else None
    dense = [use.grad for use in uses if isinstance(use, DenseUse)]
    if dense:
        return DenseUse(torch.stack(dense).sum(0)) if len(dense) == len(uses) else None
    linear = [use.packed() for use in uses if isinstance(use, LinearUse)]
    tables = [use.rows for use in uses if isinstance(use, RowsUse)]
    rows = _merge_rows(tables) if tables else None
    if not linear:
        return RowsUse(rows) if rows is not None else None
    merged = linear[0] if len(linear) == 1 else _merge_linear(linear)
    return replace(merged, rows=rows)


def _merge_linear(uses: Sequence[LinearUse]) -> LinearUse:
    order, offsets = _interleave([use.offsets for use in uses])
    x, dy = torch.cat([use.x for use in uses]), torch.cat([use.dy for use in uses])
    return LinearUse(x[order.to(x.device)], dy[order.to(x.device)], offsets)


def _merge_experts(stacks: Sequence[ExpertsUse]) -> ExpertsUse:
    parts: defaultdict[int, list[LinearUse]] = defaultdict(list)
    for stack in stacks:
        for expert, part in stack.parts.items():
            parts[expert].append(part)
    merged = {expert: found[0] if len(found) == 1 else _merge_linear(found) for expert, found in parts.items()}
    return ExpertsUse(merged, stacks[0].stack)


def _merge_rows(tables: Sequence[SparseRows]) -> SparseRows:
    if len(tables) == 1:
        return tables[0]
    order, offsets = _interleave([table.offsets for table in tables])
    ids, grad = torch.cat([table.ids for table in tables]), torch.cat([table.grad for table in tables])
    return SparseRows(ids[order.to(ids.device)], grad[order.to(ids.device)], offsets)


def _interleave(offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Order that brings the rows of one example together, and the offsets of the result."""
    example = torch.cat(
        [torch.repeat_interleave(torch.arange(bounds.numel() - 1), bounds.diff()) for bounds in offsets]
    )
    return example.argsort(stable=True), torch.stack(list(offsets)).sum(0)


def scale(use: Use | RestUse, factors: Tensor, receive: ReceivePart) -> Use | RestUse:
    """The use of gradients scaled per example, `factors` [B]; parts before a rest go to `receive`."""
    if isinstance(use, RestUse):
        rows = _scale_rows(use.rows, factors) if use.rows is not None else None
        return replace(use, rows=rows, parts=use.again(factors, receive))
    if isinstance(use, DenseUse):
        return DenseUse(use.grad * factors.to(use.grad.dtype).view(-1, *[1] * (use.grad.dim() - 1)))
    if isinstance(use, RowsUse):
        return RowsUse(_scale_rows(use.rows, factors))
    if isinstance(use, ExpertsUse):
        return replace(use, parts={expert: _scale_linear(part, factors) for expert, part in use.parts.items()})
    return _scale_linear(use, factors)


def _scale_linear(use: LinearUse, factors: Tensor) -> LinearUse:
    scaled = _scale(use.dy, spans_of(use.offsets, use.starts), factors)
    # Rounded as it came: a wider one would leave the products of narrow factors.
    rows = _scale_rows(use.rows, factors) if use.rows is not None else None
    return replace(use, dy=scaled.to(use.dy.dtype), rows=rows)


def _scale_rows(rows: SparseRows, factors: Tensor) -> SparseRows:
    return replace(rows, grad=_scale(rows.grad, spans_of(rows.offsets), factors))


def _scale(rows: Tensor, spans: Spans, factors: Tensor) -> Tensor:
    """Rows [N, F] times the factor of their example, and padding times 0."""
    wide = _wide(rows)
    of_examples = torch.cat([factors, factors.new_zeros(1)]).to(wide.dtype)
    return wide * of_examples[owners_on(tuple(spans), len(rows), rows.device)][:, None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def example_gradient(use: Use, example: int, shape: torch.Size) -> Tensor:
    """The whole gradient of one example, `shape`; float64 when captured so, else float32."""
    if isinstance(use, DenseUse):
        return use.grad[example]
    if isinstance(use, ExpertsUse):
        return _expert_gradients(use, example, shape)
    rows = use.rows
    dtype = torch.promote_types((use.x if isinstance(use, LinearUse) else use.rows.grad).dtype, torch.float32)
    if isinstance(use, LinearUse):
        span = slice(*spans_of(use.offsets, use.starts)[example])
        grad = use.dy[span].to(dtype).T @ use.x[span].to(dtype)
    else:
        grad = use.rows.grad.new_zeros(shape, dtype=dtype)
    if rows is not None:
        span = slice(*rows.offsets[example : example + 2].tolist())
        grad.index_add_(0, rows.ids[span], rows.grad[span].to(dtype))
    return grad


def _expert_gradients(use: ExpertsUse, example: int, shape: torch.Size) -> Tensor:
    some = next(iter(use.parts.values()))
    whole = some.x.new_zeros(shape, dtype=torch.promote_types(some.x.dtype, torch.float32))
    matrices = use.stack.matrices(whole)
    for expert, part in use.parts.items():
        matrices[expert] = example_gradient(part, example, matrices.shape[1:])
    return whole
