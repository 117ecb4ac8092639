"""From captured per-example gradients to scores ΔL: one sink for all parameters of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from montessori import ops
from montessori import reference as equations
from montessori.optim_state import AdamWState
from montessori.uses import DenseUse, LinearUse, Use, example_gradient, scale


@dataclass
class InfluenceSink:
    """Adds up ⟨q, Δ(g_i)⟩ over all parameters (Eq. 3); `scores` is float64 [B, K].

    `drift` is ⟨q, Δ(0)⟩ per parameter, [K]: the score where an example has no gradient.
    """

    q: Mapping[str, Tensor]
    state: AdamWState
    parameters: Mapping[str, nn.Parameter]
    drift: Mapping[str, Tensor]
    impl: str
    scores: Tensor = field(init=False)

    def start(self, size: int) -> None:
        some = next(iter(self.drift.values()))
        self.scores = some.new_zeros(size, some.shape[0])

    def use(self, name: str, use: Use) -> None:
        entry = self.state[name]
        rest = (self.q[name], entry.exp_avg, entry.exp_avg_sq, self.parameters[name].detach(), entry.step)
        if isinstance(use, LinearUse):
            self.scores += ops.linear_influence(use.x, use.dy, use.offsets, *rest, rows=use.rows, impl=self.impl)
        elif isinstance(use, DenseUse):
            self.scores += ops.adam_influence(use.grad, *rest, impl=self._small)
        else:
            self.scores += ops.embedding_influence(use.rows, *rest, drift=self.drift[name], impl=self._small)

    def absent(self, name: str) -> None:
        self.scores += self.drift[name]

    @property
    def _small(self) -> str:
        """`impl` of the operators that the compiled kernels for linear layers do not have."""
        return self.impl if self.impl == "reference" else "auto"


def parameter_drift(
    q: Mapping[str, Tensor], state: AdamWState, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """⟨q, Δ(0)⟩ per parameter, float64 [K]: momentum and weight decay alone."""
    drift = {}
    for name, parameter in parameters.items():
        entry, value = state[name], parameter.detach()
        zero = value.new_zeros(()).expand(1, *value.shape)
        drift[name] = ops.adam_influence(zero, q[name], entry.exp_avg, entry.exp_avg_sq, value, entry.step)[0]
    return drift


@dataclass
class ClippingSink:
    """Holds a batch's gradients until their global norms are known, then passes them on scaled by c.

    Clipping (Eq. 1) needs ‖g_i‖ over all parameters before the first Δ, so dY of every layer stays in
    memory for the length of one batch.
    """

    target: InfluenceSink
    max_grad_norm: float
    held: dict[str, Use] = field(default_factory=dict)

    def use(self, name: str, use: Use) -> None:
        self.held[name] = use

    def absent(self, name: str) -> None:
        self.target.absent(name)

    def release(self, size: int) -> None:
        """Scale and forward everything held; call once after the backward pass."""
        squares = torch.zeros(size, dtype=torch.float64)
        for name, use in self.held.items():
            shape = self.target.parameters[name].shape
            for example in range(size):
                squares[example] += example_gradient(use, example, shape).double().square().sum().cpu()
        factors = equations.clip_factor(squares.sqrt(), self.max_grad_norm)
        for name in list(self.held):
            use = self.held.pop(name)
            self.target.use(name, scale(use, factors.to(self.target.scores.device)))
