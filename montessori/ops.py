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
from types import ModuleType

import torch
from torch import Tensor

from montessori import blocked, cpu, cuda, gpu
from montessori.errors import ArgumentError
from montessori.steps import AdamWStep, OptimizerStep, SGDStep
from montessori.validation import check_ids, check_offsets, check_shape, check_state, check_tensors

__all__ = [
    "AdamWStep",
    "SGDStep",
    "SparseRows",
    "adam_influence",
    "available_impls",
    "check_impl",
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


_LINEAR: dict[str, Callable[..., Tensor]] = {
    "cuda": cuda.linear_influence,
    "triton": gpu.linear_influence,
    "cpu": cpu.linear_influence,
    "reference": blocked.linear_influence,
}
_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "cuda": cuda.unavailable,
    "triton": gpu.unavailable,
    "cpu": cpu.unavailable,
}
# Fastest first; "reference" takes every argument that the checks let through.
_PREFERENCE = ("cuda", "triton", "cpu", "reference")
# What "auto" tries by the tensors' device. The CUDA kernels join once a measurement on a GPU shows them faster.
_AUTO = {"cuda": "triton", "cpu": "cpu"}


def available_impls() -> tuple[str, ...]:
    """Names that `impl=` accepts in this installation, besides "auto"."""
    return tuple(name for name in _PREFERENCE if name not in _UNAVAILABLE or _UNAVAILABLE[name]() is None)


def check_impl(impl: str) -> str:
    """`impl` itself, if it is "auto" or an implementation of this installation.

    Raises ArgumentError with the reason otherwise.
    """
    if impl == "auto" or impl in available_impls():
        return impl
    reason = f": {_UNAVAILABLE[impl]()}" if impl in _UNAVAILABLE else ""
    known = ", ".join(repr(name) for name in available_impls())
    raise ArgumentError(f"impl={impl!r}: expected 'auto' or one of {known} in this installation{reason}")


def choose_impl(impl: str, step: OptimizerStep, *tensors: Tensor | None) -> tuple[str, str]:
    """The implementation that `linear_influence` uses for these arguments, and why.

    "auto" takes the fastest kernels made for the tensors' device, else plain torch. Raises ArgumentError
    when an implementation asked for by name cannot take the arguments.
    """
    check_impl(impl)
    if impl == "reference":
        return impl, "asked for by name"
    name = impl if impl != "auto" else _AUTO.get(_device_type(tensors), "reference")
    if name == "reference":
        return name, f"no kernels for the device {_device_type(tensors)!r}"
    reason = _unsupported(name, step, *tensors)
    if reason is None:
        return name, "asked for by name" if impl == name else f"kernels made for the device {_device_type(tensors)!r}"
    if impl == name:
        raise ArgumentError(f"impl={name!r}: {reason}; pass impl='auto' or 'reference'")
    return "reference", f"not {name!r}, because {reason}"


def _device_type(tensors: tuple[Tensor | None, ...]) -> str:
    return next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")


def _unsupported(name: str, step: OptimizerStep, *tensors: Tensor | None) -> str | None:
    if name == "triton":
        return gpu.unsupported(*tensors)
    return cuda.unsupported(step, *tensors) if name == "cuda" else cpu.unsupported(step, *tensors)


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
    extra = rows.grad if rows is not None else None
    chosen, _ = choose_impl(impl, step, x, dy, q, exp_avg, exp_avg_sq, param, extra)
    return _LINEAR[chosen](x, dy, bounds, q, exp_avg, exp_avg_sq, param, step, rows)


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
    backend = _choose_small(impl, rows.grad, q, exp_avg, exp_avg_sq, param)
    if drift is None:
        drift = backend.adam_influence(param.new_zeros(1, *param.shape), q, exp_avg, exp_avg_sq, param, step)[0]
    check_shape("drift", drift, (q.shape[0],), "[K]")
    return backend.embedding_influence(rows, q, exp_avg, exp_avg_sq, param, step, drift)


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
    backend = _choose_small(impl, grad, q, exp_avg, exp_avg_sq, param)
    return backend.adam_influence(grad, q, exp_avg, exp_avg_sq, param, step)


def _choose_small(impl: str, grad: Tensor, *state: Tensor | None) -> ModuleType:
    """The backend module of the operators that have no compiled kernels for the CPU."""
    if impl not in ("auto", "triton", "reference"):
        raise ArgumentError(f"impl={impl!r}: expected 'auto' or one of 'triton', 'reference' for this operator")
    if impl == "reference" or (impl == "auto" and not grad.is_cuda):
        return blocked
    reason = gpu.unsupported(grad, *state)
    if reason is not None and impl == "triton":
        raise ArgumentError(f"impl='triton': {reason}; pass impl='auto' or 'reference'")
    return gpu if reason is None else blocked


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
