"""What is computed once for all candidates: the reference gradient, where it is taken, and the drift.

Of unrounded products, whatever torch's switches say: rounded factors move a loss by more than a step does, and
the reference gradient's small sums over all parameters by as much.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from montessori.batching import Example
from montessori.errors import CurvatureWarning, NonFiniteLossError
from montessori.live import undisturbed
from montessori.losses import LossFunction
from montessori.optim_state import AdamWState
from montessori.oracle import apply_step, mean_delta, restored
from montessori.parameters import trainable_parameters
from montessori.products import fast_products, unrounded_products
from montessori.referenceset import ReferenceSets
from montessori.scoring import parameter_drift

# On a small model with steps of growing size (benchmarks.truth), median errors stay below 1 % up to a curvature of 0.1
# and exceed 25 % at 0.13. Where the anchor's own change crosses 0 the warning may be a false alarm.
ROUGH_CURVATURE = 0.1
# What rounding may make of the difference of two losses, in parts of the loss and of its dtype's epsilon.
ROUNDING = 8


@dataclass(frozen=True)
class Expansion:
    """ΔL_i ≈ `constant` + ⟨q, Δ(g_i)⟩ for every candidate (Eq. 3 and 4).

    `q`: [K, *shape] per parameter. `constant`: float64 [K], 0 without an anchor. `drift`: ⟨q, Δ(0)⟩ per
    parameter, float64 [K]. `loss`: L(θ), float64 [K]. `curvature`: how far the anchor's real loss change and
    its own linear prediction lie apart, over the sum of their sizes, [K]: between 0 and 1, and 0 without an anchor.
    """

    q: dict[str, Tensor]
    constant: Tensor
    drift: dict[str, Tensor]
    loss: Tensor
    curvature: Tensor

    @property
    def drift_delta(self) -> Tensor:
        """ΔL of the step with g = 0, float64 [K]."""
        return self.constant + torch.stack(list(self.drift.values())).sum(0).cpu()


@unrounded_products()
def expand_at_theta(
    model: nn.Module, state: AdamWState, sets: ReferenceSets, reference_loss: LossFunction, impl: str
) -> Expansion:
    """Eq. 3: the reference gradient at θ. `impl` as in `montessori.ops`, of the drift."""
    parameters = trainable_parameters(model)
    with fast_products(model):
        q, loss = sets.gradient(model, parameters, reference_loss)
    zero = torch.zeros_like(loss)
    return Expansion(q, zero, parameter_drift(q, state, parameters, impl), loss, zero)


@unrounded_products()
def expand_at_anchor(
    model: nn.Module,
    state: AdamWState,
    sets: ReferenceSets,
    reference_loss: LossFunction,
    impl: str,
    pilot: Sequence[Example],
    loss_function: LossFunction,
    max_grad_norm: float | None,
) -> Expansion:
    """Eq. 4: the reference gradient at θ_a = θ + Δ̄, Δ̄ the mean step over `pilot`. `impl` as in `montessori.ops`, of
    the steps and of the drift."""
    parameters = trainable_parameters(model)
    with fast_products(model):
        anchor = mean_delta(model, parameters, state, pilot, loss_function, max_grad_norm, impl)
        loss = sets.loss(model, reference_loss)
        with restored(parameters) as theta:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.add_(anchor.pop(name))
            with undisturbed(parameters):
                try:
                    q, loss_at_anchor = sets.gradient(model, parameters, reference_loss)
                except NonFiniteLossError as error:
                    raise NonFiniteLossError(
                        "the mean step of the pilot candidates, the anchor, leads to where the loss of the reference "
                        "is not finite, though it is finite before that step: look at lr, eps and exp_avg_sq of the "
                        "optimizer; method='first_order' takes no such step"
                    ) from error
            predicted = _dot_moved(q, parameters, theta)
            moved = loss_at_anchor - loss
            sizes = moved.abs() + predicted.abs()
            curvature = ((moved - predicted).abs() / sizes).nan_to_num(nan=0.0)
            # What is not finite at the anchor is not linear.
            curvature[~sizes.isfinite()] = 1.0
            untrue = torch.zeros_like(curvature, dtype=torch.bool)
            if bool((curvature > ROUGH_CURVATURE).any()):
                of_part = partial(_changes_of_part, model, sets, reference_loss, parameters, theta, q)
                eps = max(torch.finfo(parameter.dtype).eps for parameter in parameters.values())
                untrue = _falls_like_the_way(moved, predicted, loss_at_anchor, eps, of_part)
    _warn_of_curvature(curvature, untrue, sets.names)
    drift = parameter_drift(q, state, parameters, impl)
    return Expansion(q, moved - predicted, drift, loss, curvature)


def _falls_like_the_way(
    moved: Tensor,
    predicted: Tensor,
    at_anchor: Tensor,
    eps: float,
    of_part: Callable[[float, float], tuple[Tensor, Tensor]],
) -> Tensor:
    """Whether real and predicted loss change on the way to the anchor lie apart because q is not the derivative there.

    Of a tenth of the way, the last, a gap is then a tenth, and where the loss bends a hundredth. A step so large that
    the loss jumps about may look alike at one of two scales. What rounding hides is held for a bend.
    """
    gap, rounding = (moved - predicted).abs(), ROUNDING * eps * at_anchor.abs()
    untrue, here = gap / 10 > rounding, 1.0
    for there in (0.9, 0.99):
        if not bool(untrue.any()):
            break
        loss, left = of_part(here, there)
        closer = (at_anchor - loss - predicted + left).abs()
        untrue &= (gap / 10 < rounding) | ((gap / 25 < closer) & (closer < gap / 4))
        gap, here = closer, there
    return untrue


def _changes_of_part(
    model: nn.Module,
    sets: ReferenceSets,
    reference_loss: LossFunction,
    parameters: Mapping[str, nn.Parameter],
    theta: Mapping[str, Tensor],
    q: Mapping[str, Tensor],
    here: float,
    there: float,
) -> tuple[Tensor, Tensor]:
    """L at the part `there` of the way from θ to the anchor, where the parameters are at `here`, and ⟨q, that part⟩."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.lerp_(theta[name], 1 - there / here)
    with undisturbed(parameters):
        loss = sets.loss(model, reference_loss, require_finite=False)
    return loss, _dot_moved(q, parameters, theta)


def _warn_of_curvature(curvature: Tensor, untrue: Tensor, names: Sequence[str]) -> None:
    for name, value, wrong in zip(names, curvature.tolist(), untrue.tolist(), strict=True):
        if value > ROUGH_CURVATURE:
            advice = (
                "however short the step: autograd's gradient is not the derivative of this model's loss, or the step "
                "is far too large for any; use method='exact'"
                if wrong
                else f"expected less than {ROUGH_CURVATURE:.0%}; a step this large is not linear, compare with `audit` "
                "before use"
            )
            warnings.warn(
                f"{name}: real and predicted loss change at the anchor are {value:.0%} of their size apart, {advice}",
                CurvatureWarning,
                stacklevel=2,
            )


@torch.no_grad()
def _dot_moved(q: Mapping[str, Tensor], parameters: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Tensor:
    """⟨q, parameters − theta⟩, float64 [K] on the CPU: the way really gone, roundings of the weights included."""
    total = torch.zeros(next(iter(q.values())).shape[0], dtype=torch.float64)
    for name, parameter in parameters.items():
        moved = parameter - theta[name]
        rows = moved.reshape(moved.shape[0], -1) if moved.dim() else moved.reshape(1, 1)
        for k, group in enumerate(q[name]):
            products = group.reshape(rows.shape) * rows
            total[k] += products.sum(dim=1).double().sum().cpu()
    return total


def real_drift(
    model: nn.Module, state: AdamWState, sets: ReferenceSets, reference_loss: LossFunction, impl: str
) -> tuple[Tensor, Tensor]:
    """ΔL of the real step with g = 0, NaN where that step is not finite, and L(θ), each float64 [K]."""
    parameters = trainable_parameters(model)
    with real_products(model, impl), restored(parameters):
        loss = sets.loss(model, reference_loss)
        apply_step(parameters, state, dict.fromkeys(parameters))
        with undisturbed(parameters):
            after = sets.loss(model, reference_loss, require_finite=False)
    return after - loss, loss


@contextmanager
def real_products(model: nn.Module, impl: str) -> Iterator[None]:
    """Matrix products of real steps: of unrounded factors, since rounding them moves a loss by more than such a step
    does. "reference", the truth of audits, keeps to torch's own."""
    with unrounded_products(), nullcontext() if impl == "reference" else fast_products(model):
        yield
