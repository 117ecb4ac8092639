"""The oracle: a real optimizer step on one example, the reference loss after it, and the way back.

Everything happens in memory on the live model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from montessori import ops
from montessori import reference as equations
from montessori.batching import Example, collate
from montessori.errors import UntrainedLossError
from montessori.live import to_the_end
from montessori.losses import response_loss
from montessori.passes import evaluation_mode, example_losses, gradients_aside
from montessori.steps import AdamWStep

if TYPE_CHECKING:
    from montessori.losses import LossFunction
    from montessori.optim_state import AdamWState

Gradients = Mapping[str, Tensor | None]


@contextmanager
def restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Whatever happens to the parameters inside, they leave equal bit for bit.

    Yields the saved values; `restore(parameters, saved)` puts them back earlier, as often as needed.
    """
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield saved
    finally:
        to_the_end(partial(restore, parameters, saved))


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def example_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], example: Example, loss: LossFunction
) -> tuple[dict[str, Tensor | None], float]:
    """Plain autograd's gradient of ℓ_i for every parameter (None where there is none), and ℓ_i."""
    batch = collate([example]).to(next(iter(parameters.values())).device)
    with evaluation_mode(model), gradients_aside(parameters.values()):
        value = example_losses(model, batch, loss)
        value.sum().backward()
        return {name: parameter.grad for name, parameter in parameters.items()}, float(value.detach()[0])


def gradient_norms(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], example: Example, loss: LossFunction
) -> Tensor:
    """‖∂ℓ_i‖ by plain autograd for every parameter, 0 where there is no gradient, float64: none is held longer than its
    norm takes, beside what a run holds by then."""
    norms: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            norms[name] = norm(parameter.grad)
            parameter.grad = None

    batch = collate([example]).to(next(iter(parameters.values())).device)
    with evaluation_mode(model), gradients_aside(parameters.values()), ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(take, name)).remove)
        try:
            example_losses(model, batch, loss).sum().backward()
        except UntrainedLossError:
            if loss is response_loss:
                raise
    nothing = next(iter(parameters.values())).new_zeros((), dtype=torch.float64)
    return torch.stack([norms.get(name, nothing) for name in parameters])


def candidate_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], example: Example, loss: LossFunction
) -> tuple[Gradients, float]:
    """`example_gradients`; of a loss function of the user's own, no gradient where this row's loss depends on no
    parameter: a row of advantage 0, say, in a batch with others."""
    try:
        return example_gradients(model, parameters, example, loss)
    except UntrainedLossError:
        if loss is response_loss:
            raise
    batch = collate([example]).to(next(iter(parameters.values())).device)
    with evaluation_mode(model), torch.no_grad():
        return dict.fromkeys(parameters), float(example_losses(model, batch, loss)[0])


def norm(tensor: Tensor) -> Tensor:
    """‖tensor‖ over all its values, a float64 scalar. Rows first, in the tensor's precision or float32: as exact as in
    float64, which torch is twenty times slower in, while a float32 sum over a large matrix is off by per cents."""
    if tensor.numel() == 0:
        return tensor.new_zeros((), dtype=torch.float64)
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    of_rows = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return torch.linalg.vector_norm(of_rows, dtype=torch.float64)


def clip_gradients(grads: Gradients, max_grad_norm: float | None) -> Gradients:
    """Gradients times c of Eq. 1; unchanged when clipping is off."""
    if max_grad_norm is None:
        return grads
    total = torch.stack([norm(grad) for grad in grads.values() if grad is not None]).norm()
    factor = equations.clip_factor(total, max_grad_norm)
    return {name: None if grad is None else grad * factor.to(grad.dtype) for name, grad in grads.items()}


@torch.no_grad()
def apply_step(
    parameters: Mapping[str, nn.Parameter],
    state: AdamWState,
    grads: Gradients,
    max_grad_norm: float | None = None,
    impl: str = "reference",
) -> None:
    """Take the optimizer step in place; the optimizer state is not advanced.

    A parameter without gradient steps with gradient 0, as an accumulated zero gradient would make it. `impl` as in
    `montessori.ops.adam_step_`; "reference" has the bits of `optimizer.step()`.
    """
    grads = clip_gradients(grads, max_grad_norm)
    for name, parameter in parameters.items():
        grad, entry = grads[name], state[name]
        grad = torch.zeros_like(parameter) if grad is None else grad
        ops.adam_step_(parameter, parameter, grad, entry.exp_avg, entry.exp_avg_sq, entry.step, impl=impl)


def mean_delta(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    state: AdamWState,
    examples: Sequence[Example],
    loss: LossFunction,
    max_grad_norm: float | None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """Δ̄ of Eq. 4 per parameter: the mean step over `examples`, or the step with g = 0 when none is given.

    An example whose gradient is not finite is left out of the mean; scoring reports it. `impl` as in
    `montessori.ops.adam_step_`.
    """
    # The kernels' steps are of contiguous tensors.
    total = {
        name: torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        for name, parameter in parameters.items()
    }
    taken = 0
    for example in examples:
        grads, _ = candidate_gradients(model, parameters, example, loss)
        if all(grad is None or is_finite(grad) for grad in grads.values()):
            _add_delta(total, parameters, state, clip_gradients(grads, max_grad_norm), impl)
            taken += 1
    if not taken:
        _add_delta(total, parameters, state, dict.fromkeys(parameters), impl)
    return {name: value.div_(max(taken, 1)) for name, value in total.items()}


@torch.no_grad()
def _add_delta(
    total: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    state: AdamWState,
    grads: Gradients,
    impl: str,
) -> None:
    for name, parameter in parameters.items():
        entry, grad, summed = state[name], grads[name], total[name]
        grad = torch.zeros_like(parameter) if grad is None else grad
        step, decay = entry.step, entry.step.weight_decay
        # The step starts from the sum, whose values are not the weights that decay.
        if decay and isinstance(step, AdamWStep) and step.decoupled:
            summed.add_(parameter, alpha=-step.lr * decay)
        elif decay:
            grad = grad.add(parameter, alpha=decay)
        step = replace(step, weight_decay=0.0)
        ops.adam_step_(summed, summed, grad, entry.exp_avg, entry.exp_avg_sq, step, impl=impl)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are, by one pass without a copy, which is a tenth of that of `isfinite`: NaN and infinity stay
    in a sum. Where finite values overflow it, their largest magnitude tells."""
    if tensor.numel() == 0 or bool(tensor.sum().isfinite()):
        return True
    return bool(torch.linalg.vector_norm(tensor, ord=float("inf")).isfinite())
