"""The plain torch implementation behind `montessori.ops`, impl="reference".

One row block of one example's gradient is alive at a time. The constants of Eq. 1 are folded so that
a block costs six passes over cache-resident memory:

    a1 = β1/(1−β1^t)   a2 = (1−β1)/(1−β1^t)   s1 = β2/(1−β2^t)   s2 = (1−β2)/(1−β2^t)
    q·Δ = −lr · [ q · (a1 m + a2 g) / (sqrt(s1 v + s2 g²) + ε) + λ q · θ ]

where s1 > 1, both sides of the fraction over sqrt(s1) (`AdamWStep.folded`).

The step itself follows torch's own single-tensor AdamW, Adam and SGD operation by operation, so it gives the same bits
as `optimizer.step()`.

Arguments are trusted here; `montessori.ops` has checked them. Dimensions as there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from montessori.steps import AdamWStep, OptimizerStep, SGDStep

if TYPE_CHECKING:
    from montessori.ops import SparseRows
    from montessori.spans import Spans

# Elements of a block: large enough to hide the cost of calling six operations, small enough that the
# block, its scratch and its optimizer state stay in the cache.
BLOCK_ELEMENTS = 1 << 16
_SUMMED = 8192  # rows


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


@dataclass
class _AdamBlock:
    """A flat block of a parameter with the constants of the step folded in."""

    q: Tensor  # [K, n]
    momentum: Tensor  # a1 m, [n]
    second: Tensor  # s1 v, [n]
    decay: Tensor | None  # λ θ, [n], only for Adam with L2
    constant: Tensor  # −lr λ Σ q θ, [K] float64
    a2: float
    s2: float
    eps: float
    lr: float
    scratch: Tensor  # [n]

    def score(self, grad: Tensor) -> Tensor:
        """Σ q·Δ(grad) of the block, float64 [K]; overwrites `grad` [n]."""
        if self.decay is not None:
            grad.add_(self.decay)
        root = torch.addcmul(self.second, grad, grad, value=self.s2, out=self.scratch).sqrt_().add_(self.eps)
        update = torch.add(self.momentum, grad, alpha=self.a2, out=grad).div_(root)
        return torch.mv(self.q, update).double().mul_(-self.lr).add_(self.constant)


@dataclass
class _SGDBlock:
    q: Tensor
    constant: Tensor  # Σ q·Δ(0), [K] float64
    slope: float  # Δ(g) = Δ(0) + slope · g

    def score(self, grad: Tensor) -> Tensor:
        return torch.mv(self.q, grad).double().mul_(self.slope).add_(self.constant)


def _adam_block(
    q: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, step: AdamWStep, dtype: torch.dtype
) -> _AdamBlock:
    a1, a2, s1, s2, eps = step.folded
    q, param = q.flatten(1).to(dtype), param.flatten().to(dtype)
    constant = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
    if step.decoupled and step.weight_decay:
        constant = torch.mv(q, param).double() * (-step.lr * step.weight_decay)
    return _AdamBlock(
        q=q,
        momentum=exp_avg.flatten().to(dtype) * a1,
        second=exp_avg_sq.flatten().to(dtype) * s1,
        decay=None if step.decoupled or not step.weight_decay else param * step.weight_decay,
        constant=constant,
        a2=a2,
        s2=s2,
        eps=eps,
        lr=step.lr,
        scratch=torch.empty_like(param),
    )


def _sgd_block(
    q: Tensor, momentum_buffer: Tensor | None, param: Tensor, step: SGDStep, dtype: torch.dtype
) -> _SGDBlock:
    q, param = q.flatten(1).to(dtype), param.flatten().to(dtype)
    on_grad, on_buffer = step.line(buffered=step.step > 1 and momentum_buffer is not None)
    at_zero = param * (step.weight_decay * on_grad)
    if on_buffer and momentum_buffer is not None:
        at_zero = at_zero + momentum_buffer.flatten().to(dtype) * on_buffer
    return _SGDBlock(q, torch.mv(q, at_zero).double() * -step.lr, -step.lr * on_grad)


def _block(
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    dtype: torch.dtype,
) -> _AdamBlock | _SGDBlock:
    if isinstance(step, SGDStep):
        return _sgd_block(q, exp_avg, param, step, dtype)
    if exp_avg is None or exp_avg_sq is None:
        raise TypeError("an AdamWStep needs exp_avg and exp_avg_sq, got None")
    return _adam_block(q, exp_avg, exp_avg_sq, param, step, dtype)


def _blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    height = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    for start in range(0, num_rows, height):
        yield slice(start, min(start + height, num_rows))


def _rows_by_id(rows: SparseRows, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Per example: sorted ids and their gradients, so that a block of the table is one slice."""
    bounds = rows.offsets.tolist()
    sorted_rows = []
    for low, high in itertools.pairwise(bounds):
        ids, order = rows.ids[low:high].sort(stable=True)
        sorted_rows.append((ids, rows.grad[low:high].to(dtype)[order]))
    return sorted_rows


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
    """Eq. 5 block by block; see `montessori.ops.linear_influence`."""
    dtype = _compute_dtype(x, dy, q, exp_avg, exp_avg_sq, param, None if rows is None else rows.grad)
    x, dy = x.to(dtype), dy.to(dtype)
    num_examples, (num_out, num_in) = len(spans), param.shape
    scores = torch.zeros(num_examples, q.shape[0], dtype=torch.float64, device=x.device)
    extra = _rows_by_id(rows, dtype) if rows is not None else None
    for span in _blocks(num_out, num_in):
        state = [tensor[span] if tensor is not None else None for tensor in (exp_avg, exp_avg_sq)]
        block = _block(q[:, span], state[0], state[1], param[span], step, dtype)
        scratch = x.new_empty(span.stop - span.start, num_in)
        for example, (low, high) in enumerate(spans):
            grad = torch.mm(dy[low:high, span].T, x[low:high], out=scratch)
            if extra is not None:
                ids, row_grad = extra[example]
                touched = slice(*torch.searchsorted(ids, ids.new_tensor([span.start, span.stop])).tolist())
                grad.index_add_(0, ids[touched] - span.start, row_grad[touched])
            scores[example] += block.score(grad.view(-1))
    return scores


def adam_influence(
    grad: Tensor | None,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
) -> Tensor:
    """Eq. 3 for ready gradients; see `montessori.ops.adam_influence`."""
    if grad is None:
        grad = param.new_zeros(()).expand(1, *param.shape)
    dtype = _compute_dtype(grad, q, exp_avg, exp_avg_sq, param)
    num_examples = grad.shape[0]
    scores = torch.zeros(num_examples, q.shape[0], dtype=torch.float64, device=grad.device)
    flat = [tensor.flatten() if tensor is not None else None for tensor in (exp_avg, exp_avg_sq, param)]
    grad, q = grad.reshape(num_examples, param.numel()), q.reshape(q.shape[0], param.numel())
    for span in _blocks(param.numel(), 1):
        parts = [tensor[span] if tensor is not None else None for tensor in flat]
        block = _block(q[:, span], parts[0], parts[1], param.flatten()[span], step, dtype)
        for example in range(num_examples):
            scores[example] += block.score(grad[example, span].to(dtype, copy=True))
    return scores


def row_changes(
    rows: SparseRows,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    base: Sequence[tuple[Tensor, Tensor]] | None,
    dense: Callable[..., Tensor],
) -> Tensor:
    """f(h + g) − f(h) of the touched rows by `dense`, an `adam_influence`; see `montessori.ops.row_changes`."""
    given = [rows.grad, q] + [grad for _, grad in base or ()]
    wide = _compute_dtype(*given)
    scores = torch.zeros(rows.offsets.numel() - 1, q.shape[0], dtype=torch.float64, device=param.device)
    for b, (low, high) in enumerate(itertools.pairwise(rows.offsets.tolist())):
        ids, position = rows.ids[low:high].unique(return_inverse=True)
        if not ids.numel():
            continue
        before = rows.grad.new_zeros(ids.numel(), param.shape[1], dtype=wide)
        if base is not None:
            before += base[b][1][torch.searchsorted(base[b][0], ids)]
        after = before.index_add(0, position, rows.grad[low:high].to(wide))
        state = [tensor[ids] if tensor is not None else None for tensor in (exp_avg, exp_avg_sq, param)]
        both = dense(torch.stack([after, before]), q[:, ids], *state, step)
        scores[b] = both[0] - both[1]
    return scores


def example_sums(rows: Tensor, spans: Spans, times: Tensor | None, scale: Tensor | None) -> Tensor:
    """Sums of each example's rows; see `montessori.ops.example_sums`."""
    dtype = _compute_dtype(rows, times, scale)
    sums = rows.new_empty(len(spans), *rows.shape[1:], dtype=dtype)
    for example, (low, high) in enumerate(spans):
        part = rows[low:high].to(dtype)
        if times is not None:
            part = part * times[low:high]
        if scale is not None:
            part = part * scale[low:high].reshape(-1, *[1] * (part.dim() - 1))
        # In pieces: torch would spread a longer sum over its threads, and the order would change with their number.
        sums[example] = sum((chunk.sum(0) for chunk in part.split(_SUMMED)[1:]), part[:_SUMMED].sum(0))
    return sums


def adam_step_(
    param: Tensor,
    source: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: OptimizerStep,
) -> None:
    """param = source + Δ(grad); see `montessori.ops.adam_step_`."""
    if param is not source:
        param.copy_(source)
    # Of one dtype they have the bits of torch's step; torch has none for several.
    dtypes = {tensor.dtype for tensor in (param, grad, exp_avg, exp_avg_sq) if tensor is not None}
    wide = param.dtype if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes, torch.float32)
    stepped, grad = param.to(wide), grad.to(wide)
    if isinstance(step, SGDStep):
        _sgd_step(stepped, grad, None if exp_avg is None else exp_avg.to(wide), step)
    elif exp_avg is None or exp_avg_sq is None:
        raise TypeError("an AdamWStep needs exp_avg and exp_avg_sq, got None")
    else:
        _adamw_step(stepped, grad, exp_avg.to(wide), exp_avg_sq.to(wide), step)
    if stepped is not param:
        param.copy_(stepped)


def _adamw_step(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep) -> None:
    if step.weight_decay:
        if step.decoupled:
            param.mul_(1 - step.lr * step.weight_decay)
        else:
            grad = grad.add(param, alpha=step.weight_decay)
    exp_avg = exp_avg.lerp(grad, 1 - step.beta1)
    exp_avg_sq = exp_avg_sq.mul(step.beta2).addcmul_(grad, grad, value=1 - step.beta2)
    step_size = step.lr / (1 - step.beta1**step.step)
    denominator = (exp_avg_sq.sqrt() / (1 - step.beta2**step.step) ** 0.5).add_(step.eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)


def _sgd_step(param: Tensor, grad: Tensor, buffer: Tensor | None, step: SGDStep) -> None:
    if step.weight_decay:
        grad = grad.add(param, alpha=step.weight_decay)
    if step.momentum:
        if buffer is None or step.step == 1:
            buffer = grad
        else:
            buffer = buffer.mul(step.momentum).add_(grad, alpha=1 - step.dampening)
        grad = grad.add(buffer, alpha=step.momentum) if step.nesterov else buffer
    param.add_(grad, alpha=-step.lr)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Losses of rows, whose logits become weighted gradients; see `montessori.ops.cross_entropy_`."""
    rows = torch.arange(targets.numel(), device=targets.device)
    # The largest logit is taken off first: the normaliser itself may be too large to tell them apart.
    logits.sub_(logits.amax(-1, keepdim=True))
    of_target = logits[rows, targets].double()
    total = logits.exp_().sum(-1, dtype=torch.float64)
    logits.mul_((weights / total).to(logits.dtype)[:, None])
    logits[rows, targets] -= weights
    return total.log() - of_target
