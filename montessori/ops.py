"""Scores of one parameter from its per-example gradient, which is never stored whole.

    score[i, k] = Σ over elements of q[k] · Δ(g_i; exp_avg, exp_avg_sq, param)          (Eq. 3, 5, 6)

Δ is the change by one optimizer step (Eq. 1), so a score is a change of the reference loss: negative
when the example helps. Functions of scores return float64 [B, K].

Dimensions: B examples, T tokens of all examples together, O output features, I input features,
K reference sets, V rows of an embedding table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from montessori import blocked, calibration, cpu, gpu
from montessori.errors import ArgumentError
from montessori.impls import available_impls, check_impl, choose_impl
from montessori.spans import Spans
from montessori.steps import AdamWStep, OptimizerStep, SGDStep
from montessori.validation import check_ids, check_offsets, check_shape, check_spans, check_state, check_tensors

__all__ = [
    "AdamWStep",
    "SGDStep",
    "SparseRows",
    "adam_influence",
    "adam_step_",
    "available_impls",
    "check_impl",
    "choose_impl",
    "cross_entropy_",
    "draw_tiles",
    "embedding_influence",
    "example_sums",
    "linear_influence",
    "row_changes",
    "sampled_linear_influence",
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
    "cuda": calibration.linear_influence,
    "triton": gpu.linear_influence,
    "cpu": cpu.linear_influence,
    "reference": blocked.linear_influence,
}
_DENSE: dict[str, Callable[..., Tensor]] = {
    "triton": gpu.adam_influence,
    "cpu": cpu.adam_influence,
    "reference": blocked.adam_influence,
}
_STEP: dict[str, Callable[..., None]] = {
    "triton": gpu.adam_step_,
    "cpu": cpu.adam_step_,
    "reference": blocked.adam_step_,
}


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
    starts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Scores of a linear layer's weight (Eq. 5): Σ q · Δ(dYᵀX) per example and reference set.

    x [T, I] are the layer's inputs and dy [T, O] the gradients of its outputs, packed without padding;
    example b owns rows offsets[b]..offsets[b+1]-1 (offsets int64 [B+1]; an example may be empty, its
    gradient is then 0). With `starts`, int64 [B], x and dy have further rows, such as padding: example b owns as
    many rows, from row starts[b] on. q [K, O, I]; exp_avg, exp_avg_sq and param [O, I]. `rows` adds the
    embedding's gradient where the weight is tied to it. Arithmetic is float64 when any input is, else float32;
    impl="cpu" rounds float32 x and dy to bfloat16 where torch does so in its own products, that is with
    `torch.set_float32_matmul_precision("medium")` on processors with bfloat16 matrix units.
    Returns float64 [B, K]. Raises ArgumentError when an argument does not fit.
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    spans = _check_batch(x, dy, offsets, param, starts)
    if rows is not None:
        _check_rows(rows, param, len(spans) + 1)
    extra = rows.grad if rows is not None else None
    tensors = (x, dy, q, exp_avg, exp_avg_sq, param, extra)
    chosen = choose_impl(calibration.resolve(impl, step, *tensors), step, *tensors)[0]
    return _LINEAR[chosen](x, dy, spans, q, exp_avg, exp_avg_sq, param, step, rows)


@torch.no_grad()
def draw_tiles(q: Tensor, sample: float, seed: int) -> cpu.TileSample:
    """A share `sample` of the tiles of a weight, drawn for its reference gradients q [K, O, I]: strata of tiles with
    similar ‖q‖, two drawn of each. Raises ArgumentError where the compiled kernels are missing."""
    if not 0 < sample <= 1:
        raise ArgumentError(f"sample={sample}: expected a share of the tiles, 0 < sample <= 1")
    _device_of("q", q)
    if q.dim() != 3:
        raise ArgumentError(f"q: expected [K, O, I], got {list(q.shape)}")
    reason = cpu.unsupported(q)
    if reason is not None:
        raise ArgumentError(f"tiles are those of impl='cpu': {reason}")
    return cpu.TileSample.draw(q, sample, seed)


@torch.no_grad()
def sampled_linear_influence(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    *,
    tiles: cpu.TileSample,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ q · (Δ(dYᵀX) − Δ(0)) estimated from a share of the weight's tiles, and the variances of the estimates.

    The score at gradient 0, which all examples share, is left out: it can be known exactly. `tiles` are those that
    `draw_tiles` drew for this q; the estimate is unbiased over its seeds. Two results, float64 [B, K]. Raises
    ArgumentError when the compiled kernels cannot take the arguments.
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    spans = _check_batch(x, dy, offsets, param, starts)
    if tuple(q.shape) != tiles.shape:
        raise ArgumentError(f"tiles: expected those drawn for q {list(q.shape)}, got those of {list(tiles.shape)}")
    choose_impl("cpu", step, x, dy, q, exp_avg, exp_avg_sq, param)
    return cpu.sampled_linear_influence(x, dy, spans, q, exp_avg, exp_avg_sq, param, step, tiles)


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
    if drift is None:
        drift = adam_influence(None, q, exp_avg, exp_avg_sq, param, step, impl=impl)[0]
    check_shape("drift", drift, (q.shape[0],), "[K]")
    if drift.dtype is not torch.float64:
        raise ArgumentError(f"drift: expected float64, as scores are, got {drift.dtype}; convert it with .double()")
    changes = unchecked_row_changes(rows, q, exp_avg, exp_avg_sq, param, step, None, impl)
    return drift.to(param.device) + changes


@torch.no_grad()
def row_changes(
    rows: SparseRows,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    *,
    base: Sequence[tuple[Tensor, Tensor]] | None = None,
    impl: str = "auto",
) -> Tensor:
    """What the gradients of single rows add to a table's scores: Σ over touched rows of f(h + g) − f(h).

    h is 0 (Eq. 6), or per example `base[b]`: sorted ids int64 [U] and the gradient [U, I] that these rows
    have from elsewhere, as a tied head's; U covers every row the example touches. Returns float64 [B, K].
    Raises ArgumentError when an argument does not fit.
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    _matrix_shape(param)
    _check_rows(rows, param, None)
    if base is not None:
        _check_base(base, rows, param)
    return unchecked_row_changes(rows, q, exp_avg, exp_avg_sq, param, step, base, impl)


@torch.no_grad()
def unchecked_row_changes(
    rows: SparseRows,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    base: Sequence[tuple[Tensor, Tensor]] | None,
    impl: str,
) -> Tensor:
    """`row_changes` of what the package itself has made: checks would wait for the device, once an example."""
    others = [grad for _, grad in base or ()]
    chosen = _choose_dense(impl, step, rows.grad, q, exp_avg, exp_avg_sq, param, *others)
    if chosen == "triton":
        return gpu.row_changes(rows, q, exp_avg, exp_avg_sq, param, step, base)
    return blocked.row_changes(rows, q, exp_avg, exp_avg_sq, param, step, base, _DENSE[chosen])


@torch.no_grad()
def adam_influence(
    grad: Tensor | None,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    *,
    impl: str = "auto",
) -> Tensor:
    """Scores of any parameter from ready per-example gradients: grad [B, *shape], q [K, *shape].

    `grad=None` stands for one gradient that is 0 everywhere. exp_avg, exp_avg_sq and param have the
    parameter's shape. Returns float64 [B, K].
    """
    check_state(q, exp_avg, exp_avg_sq, param, step)
    if grad is not None:
        check_tensors({"grad": grad}, param.device)
        check_shape("grad", grad, (None, *param.shape), "[B, *param.shape]")
    chosen = _choose_dense(impl, step, grad, q, exp_avg, exp_avg_sq, param)
    return _DENSE[chosen](grad, q, exp_avg, exp_avg_sq, param, step)


@torch.no_grad()
def adam_step_(
    param: Tensor,
    source: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: OptimizerStep,
    *,
    impl: str = "auto",
) -> None:
    """param = source + Δ(grad) in place (Eq. 1), of one shape; the optimizer's state is not advanced.

    `param` may be `source`, and shares no memory with anything else; the way back is a copy of it. The kernels go over
    memory once and round as they do in scores; impl="reference" takes torch's own operations and has the bits of
    `optimizer.step()`.
    """
    _device_of("source", source)
    check_state(source[None], exp_avg, exp_avg_sq, source, step)
    check_tensors({"param": param, "grad": grad}, source.device)
    check_shape("param", param, tuple(source.shape), "source.shape")
    check_shape("grad", grad, tuple(source.shape), "source.shape")
    if param.dtype is not source.dtype:
        raise ArgumentError(f"source: expected {param.dtype}, as param, got {source.dtype}")
    if not param.is_contiguous():
        if impl not in ("auto", "reference"):
            raise ArgumentError(f"param: impl={impl!r} expects a contiguous tensor, got strides {param.stride()}")
        impl = "reference"
    chosen = _choose_dense(impl, step, param, grad, exp_avg, exp_avg_sq)
    _STEP[chosen](param, source, grad, exp_avg, exp_avg_sq, step)
    _written(param, chosen)


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, *, impl: str = "auto") -> Tensor:
    """Cross-entropy of the rows of `logits` [n, V], float64 [n]; the logits become weighted gradients.

    In place, row i becomes weights[i] · (softmax(logits[i]) − one-hot(targets[i])). targets int64 [n];
    logits and weights [n] are float32 or float64. There is a compiled kernel for float32 on processors; every other
    `impl` computes in plain torch. Raises ArgumentError when an argument does not fit.
    """
    check_tensors({"logits": logits, "weights": weights}, _device_of("logits", logits))
    check_shape("logits", logits, (None, None), "[n, V]")
    check_shape("targets", targets, (logits.shape[0],), "[n]")
    check_shape("weights", weights, (logits.shape[0],), "[n]")
    check_ids(targets, logits.shape[1], logits.device, "targets")
    if logits.dtype not in (torch.float32, torch.float64) or not logits.is_contiguous():
        raise ArgumentError(f"logits: expected contiguous float32 or float64, got {logits.dtype} {logits.stride()}")
    if weights.dtype is not logits.dtype:
        raise ArgumentError(f"weights: expected {logits.dtype}, as the logits, got {weights.dtype}")
    reason = cpu.unsupported(logits, weights)
    if impl == "cpu" and reason is not None:
        raise ArgumentError(f"impl='cpu': {reason}; pass impl='auto' or 'reference'")
    compiled = check_impl(impl) in ("auto", "cpu") and reason is None
    losses = (cpu if compiled else blocked).cross_entropy_(logits, targets.contiguous(), weights.contiguous())
    _written(logits, "cpu" if compiled else "reference")
    return losses


@torch.no_grad()
def example_sums(
    rows: Tensor,
    offsets: Tensor,
    *,
    starts: Tensor | None = None,
    times: Tensor | None = None,
    scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Gradients of biases and of the weights of norms: sums of each example's rows, [B, *shape], float32 or float64.

    rows [N, *shape] are the gradients by row; with `times` (of the same shape) and `scale` [N] their products, as a
    norm's dY · x · (1/σ). offsets and starts as in `linear_influence`.
    """
    check_tensors({"rows": rows, "times": times, "scale": scale}, _device_of("rows", rows))
    if rows.dim() == 0:
        raise ArgumentError("rows: expected [N, *shape], got a single number")
    if times is not None:
        check_shape("times", times, tuple(rows.shape), "rows.shape")
    if scale is not None:
        check_shape("scale", scale, (rows.shape[0],), "[N]")
    spans = check_spans(offsets, starts, rows.shape[0])
    reason = gpu.unsupported(rows, times, scale)
    by_name = check_impl(impl) in ("triton", "cuda")
    if by_name and reason is not None:
        raise ArgumentError(f"impl={impl!r}: {reason}; pass impl='auto' or 'reference'")
    fused = by_name or (impl == "auto" and reason is None and rows.is_cuda)
    return (gpu if fused else blocked).example_sums(rows, spans, times, scale)


def _written(tensor: Tensor, impl: str) -> None:
    """Autograd, and whoever watches a tensor, learn that a kernel has written it; torch's own operations say so."""
    if impl != "reference" and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _device_of(name: str, tensor: Tensor) -> torch.device:
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    return tensor.device


def _check_base(base: Sequence[tuple[Tensor, Tensor]], rows: SparseRows, param: Tensor) -> None:
    bounds = rows.offsets.tolist()
    if len(base) != len(bounds) - 1:
        raise ArgumentError(f"base: expected ids and gradients for each of {len(bounds) - 1} examples, got {len(base)}")
    for example, ((ids, grad), (low, high)) in enumerate(zip(base, pairwise(bounds), strict=True)):
        name = f"base[{example}]"
        check_ids(ids, param.shape[0], param.device, f"{name} ids")
        check_tensors({f"{name} gradient": grad}, param.device)
        check_shape(f"{name} gradient", grad, (ids.shape[0], param.shape[1]), "[U, I]")
        if bool((ids.diff() <= 0).any()) or not bool(torch.isin(rows.ids[low:high], ids).all()):
            raise ArgumentError(f"{name} ids: expected sorted ids, each once, of all rows that the example touches")


def _choose_dense(impl: str, step: OptimizerStep, *tensors: Tensor | None) -> str:
    """The implementation for ready gradients and rows; beside the CUDA library, which has matrices alone, Triton's."""
    return choose_impl("triton" if impl == "cuda" else impl, step, *tensors)[0]


def _check_batch(x: Tensor, dy: Tensor, offsets: Tensor, param: Tensor, starts: Tensor | None) -> Spans:
    """The rows of each example in x [N, I] and dy [N, O] that fit `param` [O, I]."""
    check_tensors({"x": x, "dy": dy}, param.device)
    num_out, num_in = _matrix_shape(param)
    check_shape("x", x, (None, num_in), "[T, I]")
    check_shape("dy", dy, (x.shape[0], num_out), "[T, O]")
    return check_spans(offsets, starts, x.shape[0])


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
