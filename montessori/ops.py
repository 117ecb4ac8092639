"""Scores of one parameter from its per-example gradient, which is never stored whole.

    score[i, k] = Σ over elements of q[k] · Δ(g_i; exp_avg, exp_avg_sq, param)          (Eq. 3, 5, 6)

Δ is the change by one optimizer step (Eq. 1), so a score is a change of the reference loss: negative
when the example helps. Every function returns float64 [B, K].

Dimensions: B examples, T tokens of all examples together, O output features, I input features,
K reference sets, V rows of an embedding table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from montessori import blocked
from montessori.errors import ArgumentError
from montessori.steps import AdamWStep, OptimizerStep, SGDStep
from montessori.validation import check_ids, check_offsets, check_shape, check_state, check_tensors

__all__ = [
    "AdamWStep",
    "SGDStep",
    "SparseRows",
    "adam_influence",
    "available_impls",
    "choose_impl",
    "embedding_influence",
    "linear_influence",
]


@dataclass(frozen=True)
class SparseRows:
    """Gradient of an embedding's rows: `ids` int64 [T], `grad` [T, I], `offsets` int64 [B+1].

    Example b adds grad[t] to row ids[t] for t in offsets[b]..offsets[b+1]-1; a row may come up twice.
    """

    ids: Tensor
    grad: Tensor
    offsets: Tensor


_LINEAR: dict[str, Callable[..., Tensor]] = {"reference": blocked.linear_influence}
_ADAM: dict[str, Callable[..., Tensor]] = {"reference": blocked.adam_influence}
_EMBEDDING: dict[str, Callable[..., Tensor]] = {"reference": blocked.embedding_influence}


def available_impls() -> tuple[str, ...]:
    """Names that `impl=` accepts in this installation, besides "auto"."""
    return tuple(_LINEAR)


def choose_impl(impl: str) -> str:
    """The implementation that `impl` stands for; "auto" is the last, fastest one available.

    Raises ArgumentError when an implementation asked for by name is not in this installation.
    """
    available = available_impls()
    if impl == "auto":
        return available[-1]
    if impl not in available:
        raise ArgumentError(f"impl={impl!r}: expected 'auto' or one of {', '.join(available)} in this installation")
    return impl


@torch.no_grad()
def linear_influence(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    *,
    rows: SparseRows | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scores of a linear layer's weight (Eq. 5): Σ q · Δ(dYᵀX) per example and reference set.

    x [T, I] are the layer's inputs and dy [T, O] the gradients of its outputs, packed without padding;
    example b owns rows offsets[b]..offsets[b+1]-1 (offsets int64 [B+1]; an example may be empty, its
    gradient is then 0). q [K, O, I]; exp_avg, exp_avg_sq and param [O, I]. `rows` adds the embedding's
    gradient where the weight is tied to it. Arithmetic is float64 when any input is, else float32.
    Returns float64 [B, K]. Raises ArgumentError when an argument does not fit.
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    check_tensors({"x": x, "dy": dy}, param.device)
    num_out, num_in = _matrix_shape(param)
    check_shape("x", x, (None, num_in), "[T, I]")
    check_shape("dy", dy, (x.shape[0], num_out), "[T, O]")
    bounds = check_offsets(offsets, x.shape[0])
    if rows is not None:
        _check_rows(rows, param, len(bounds))
    return _LINEAR[choose_impl(impl)](x, dy, bounds, q, exp_avg, exp_avg_sq, param, step, rows)


@torch.no_grad()
def embedding_influence(
    rows: SparseRows,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    *,
    drift: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scores of an embedding table by the rows an example touches (Eq. 6, exact).

    q [K, V, I]; exp_avg, exp_avg_sq and param [V, I]. `drift` float64 [K] is C0, the score of the whole
    table at gradient 0; it is computed when not given. Returns float64 [B, K].
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    _matrix_shape(param)
    _check_rows(rows, param, None)
    impl = choose_impl(impl)
    if drift is None:
        drift = _ADAM[impl](param.new_zeros(1, *param.shape), q, exp_avg, exp_avg_sq, param, step)[0]
    check_shape("drift", drift, (q.shape[0],), "[K]")
    return _EMBEDDING[impl](rows, q, exp_avg, exp_avg_sq, param, step, drift)


@torch.no_grad()
def adam_influence(
    grad: Tensor,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    *,
    impl: str = "auto",
) -> Tensor:
    """Scores of any parameter from ready per-example gradients: grad [B, *shape], q [K, *shape].

    exp_avg, exp_avg_sq and param have the parameter's shape. Returns float64 [B, K].
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    check_tensors({"grad": grad}, param.device)
    check_shape("grad", grad, (None, *param.shape), "[B, *param.shape]")
    return _ADAM[choose_impl(impl)](grad, q, exp_avg, exp_avg_sq, param, step)


def _matrix_shape(param: Tensor) -> tuple[int, int]:
    check_shape("param", param, (None, None), "[O, I]")
    return param.shape[0], param.shape[1]


def _check_rows(rows: SparseRows, param: Tensor, num_bounds: int | None) -> None:
    if not isinstance(rows, SparseRows):
        raise ArgumentError(f"rows: expected SparseRows, got {type(rows).__name__}")
    check_tensors({"rows.grad": rows.grad}, param.device)
    check_ids(rows.ids, param.shape[0], param.device, "rows.ids")
    check_shape("rows.grad", rows.grad, (rows.ids.shape[0], param.shape[1]), "[T, I]")
    check_offsets(rows.offsets, rows.ids.shape[0], "rows.offsets")
    if num_bounds is not None:
        check_shape("rows.offsets", rows.offsets, (num_bounds,), "[B+1], as offsets")
