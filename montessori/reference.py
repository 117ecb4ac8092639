"""The specification: every equation of docs/equations.md as one plain torch function.

Works in the dtype of its inputs, float64 included, holds whole gradients and is meant to be read.
Everything fast in this package is tested against this file.

Dimensions: B examples, T tokens, O output features, I input features, K reference sets, V rows of an
embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from montessori.steps import AdamWStep, OptimizerStep, SGDStep


def adamw_delta(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, step: AdamWStep) -> Tensor:
    """Eq. 1: change of `param` by one AdamW (or Adam) step on `grad`; all tensors of one shape."""
    if not step.decoupled:
        grad = grad + step.weight_decay * param
    exp_avg = step.beta1 * exp_avg + (1 - step.beta1) * grad
    exp_avg_sq = step.beta2 * exp_avg_sq + (1 - step.beta2) * grad**2
    exp_avg_hat = exp_avg / (1 - step.beta1**step.step)
    exp_avg_sq_hat = exp_avg_sq / (1 - step.beta2**step.step)
    decay = step.weight_decay * param if step.decoupled else 0.0
    return -step.lr * (exp_avg_hat / (exp_avg_sq_hat.sqrt() + step.eps) + decay)


def sgd_delta(grad: Tensor, momentum_buffer: Tensor | None, param: Tensor, step: SGDStep) -> Tensor:
    """Eq. 1 for SGD with momentum, as `torch.optim.SGD` defines it."""
    grad = grad + step.weight_decay * param
    if step.momentum == 0:
        return -step.lr * grad
    buffer = grad
    if momentum_buffer is not None and step.step > 1:
        buffer = step.momentum * momentum_buffer + (1 - step.dampening) * grad
    return -step.lr * (grad + step.momentum * buffer if step.nesterov else buffer)


def delta(
    grad: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, param: Tensor, step: OptimizerStep
) -> Tensor:
    """Δ(g) of whichever optimizer `step` describes; `exp_avg` is the momentum buffer for SGD."""
    if isinstance(step, SGDStep):
        return sgd_delta(grad, exp_avg, param, step)
    if exp_avg is None or exp_avg_sq is None:
        raise TypeError("an AdamWStep needs exp_avg and exp_avg_sq, got None")
    return adamw_delta(grad, exp_avg, exp_avg_sq, param, step)


def clip_factor(grad_norm: Tensor, max_grad_norm: float) -> Tensor:
    """c of Eq. 1: the factor that clipping by global norm puts on a gradient."""
    return (max_grad_norm / grad_norm).clamp(max=1.0)


def influence(loss_after: Tensor, loss_before: Tensor) -> Tensor:
    """Eq. 2: positive when the step lowers the reference loss, so when the example helps."""
    return -(loss_after - loss_before)


def first_order(q: Tensor, delta: Tensor) -> Tensor:
    """Eq. 3 for one parameter: ΔL ≈ ⟨q, Δ⟩, [K] from q [K, ...] and delta [...]."""
    return torch.stack([(group * delta).sum() for group in q])


def anchored(q_dot_delta: Tensor, q_dot_anchor: Tensor, loss_at_anchor: Tensor, loss: Tensor) -> Tensor:
    """Eq. 4: ΔL ≈ L(θ_a) − L(θ) + ⟨q(θ_a), Δ⟩ − ⟨q(θ_a), Δ̄⟩."""
    return loss_at_anchor - loss + q_dot_delta - q_dot_anchor


def linear_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Eq. 5: gradient [O, I] of a linear layer's weight from one example's x [T, I] and dy [T, O]."""
    return dy.T @ x


def embedding_gradient(ids: Tensor, dy: Tensor, num_embeddings: int) -> Tensor:
    """Gradient [V, I] of an embedding table from one example's token ids [T] and dy [T, I]."""
    return dy.new_zeros(num_embeddings, dy.shape[-1]).index_add(0, ids, dy)


def sparse_rows(all_rows_at_zero: Tensor, touched: Tensor, touched_at_zero: Tensor) -> Tensor:
    """Eq. 6: score of a table from C0, f(g) of the touched rows and f(0) of the same rows, each [K]."""
    return all_rows_at_zero + touched - touched_at_zero
