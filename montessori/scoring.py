"""From captured per-example gradients to scores ΔL: one sink for all parameters of a batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from montessori import cpu, ops
from montessori import reference as equations
from montessori.norms import squared_norms
from montessori.optim_state import AdamWState
from montessori.products import unrounded_products
from montessori.steps import OptimizerStep
from montessori.uses import DenseUse, ExpertsUse, LinearUse, RestUse, RowsUse, Stack, Use, scale

# Of a tensor [..., *shape of the parameter] some rows, or one expert's matrix.
_Select = Callable[[Tensor], Tensor]
# q, m, v and weights there, and the step.
_Rest = tuple[tuple[Tensor, Tensor | None, Tensor | None, Tensor], OptimizerStep]


@dataclass
class InfluenceSink:
    """Adds up ⟨q, Δ(g_i)⟩ over all parameters (Eq. 3); `scores` is float64 [B, K].

    `drift` is ⟨q, Δ(0)⟩ per parameter, [K]: the score where an example has no gradient. With `sample` below 1,
    matrices are scored on that share of their tiles, and `variance` [B, K] is that of the sum; `draws` keeps the
    tiles, the same for every batch. `missing` are the parameters that no example of the batch reached, `unreached` the
    ones with a drift that none of some batch did.
    """

    q: Mapping[str, Tensor]
    state: AdamWState
    parameters: Mapping[str, nn.Parameter]
    drift: Mapping[str, Tensor]
    impl: str
    sample: float = 1.0
    draws: dict[str, cpu.TileSample] = field(default_factory=dict)
    unreached: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    scores: Tensor = field(init=False)
    variance: Tensor = field(init=False)

    def start(self, size: int) -> None:
        some = next(iter(self.drift.values()))
        self.scores, self.variance = some.new_zeros(size, some.shape[0]), some.new_zeros(size, some.shape[0])

    def use(self, name: str, use: Use | RestUse) -> None:
        entry = self.state[name]
        rest = (self.q[name], entry.exp_avg, entry.exp_avg_sq, self.parameters[name].detach(), entry.step)
        if isinstance(use, LinearUse) and use.rows is None:
            self.part(name, 0, use, slice(None))
            if self.sample < 1:
                self.scores += self.drift[name]
        elif isinstance(use, LinearUse):
            self.scores += ops.linear_influence(
                use.x, use.dy, use.offsets, *rest, rows=use.rows, starts=use.starts, impl=self.impl
            )
        elif isinstance(use, DenseUse):
            self.scores += ops.adam_influence(use.grad, *rest, impl=self.impl)
        elif isinstance(use, ExpertsUse):
            for expert, part in use.parts.items():
                self._expert(name, expert, part, use.stack)
            self.scores += self.drift[name]
        elif isinstance(use, RowsUse):
            self.scores += ops.embedding_influence(use.rows, *rest, drift=self.drift[name], impl=self.impl)
        else:
            # Sampled parts are differences to gradient 0.
            self.scores += self.drift[name] if self.sample < 1 else 0.0
            if use.rows is not None:
                base = [(rows.ids, rows.grad) for rows in use.parts]
                self.scores += ops.unchecked_row_changes(use.rows, *rest, base, self.impl)

    def part(self, name: str, first: int, use: LinearUse, rows: slice) -> None:
        examples = slice(first, first + use.offsets.numel() - 1)

        def select(tensor: Tensor) -> Tensor:
            return tensor[..., rows, :]

        if self.sample == 1:
            self.scores[examples] += self._matrix(name, select, use)
        else:
            self._sampled(name, f"{rows.start}:{rows.stop}", select, use, examples)

    def _expert(self, name: str, expert: int, use: LinearUse, stack: Stack) -> None:
        """What its tokens make of the score of one expert, for the examples that have any: most have none."""
        counts = use.offsets.diff()
        examples = counts.nonzero().flatten()
        if not examples.numel():
            # Padding alone goes to this expert.
            return

        def select(tensor: Tensor) -> Tensor:
            return stack.matrices(tensor)[..., expert, :, :]

        if self.sample < 1:
            compact = torch.cat([counts.new_zeros(1), counts[examples].cumsum(0)])
            self._sampled(name, str(expert), select, replace(use, offsets=compact), examples)
            return
        # An empty example at the end: the score without a gradient.
        compact = torch.cat([counts.new_zeros(1), counts[examples].cumsum(0), counts.sum()[None]])
        found = self._matrix(name, select, replace(use, offsets=compact))
        self.scores[examples.to(found.device)] += found[:-1] - found[-1:]

    def _matrix(self, name: str, select: _Select, use: LinearUse) -> Tensor:
        rest, step = self._rest(name, select)
        return ops.linear_influence(use.x, use.dy, use.offsets, *rest, step, starts=use.starts, impl=self.impl)

    def _sampled(self, name: str, block: str, select: _Select, use: LinearUse, examples: slice | Tensor) -> None:
        rest, step = self._rest(name, select)
        key = f"{name}:{block}"
        if key not in self.draws:
            self.draws[key] = ops.draw_tiles(rest[0], self.sample, seed=zlib.crc32(key.encode()))
        scores, variance = ops.sampled_linear_influence(
            use.x, use.dy, use.offsets, *rest, step, tiles=self.draws[key], starts=use.starts
        )
        self.scores[examples] += scores
        self.variance[examples] += variance

    def _rest(self, name: str, select: _Select) -> _Rest:
        entry = self.state[name]
        exp_avg, exp_avg_sq = (None if t is None else select(t) for t in (entry.exp_avg, entry.exp_avg_sq))
        return (select(self.q[name]), exp_avg, exp_avg_sq, select(self.parameters[name].detach())), entry.step

    def absent(self, name: str) -> None:
        self.scores += self.drift[name]
        self.missing.add(name)
        if self.drift[name].any():
            self.unreached.add(name)


def parameter_drift(
    q: Mapping[str, Tensor], state: AdamWState, parameters: Mapping[str, nn.Parameter], impl: str
) -> dict[str, Tensor]:
    """⟨q, Δ(0)⟩ per parameter, float64 [K]: momentum and weight decay alone."""
    drift = {}
    for name, parameter in parameters.items():
        entry = state[name]
        rest = (entry.exp_avg, entry.exp_avg_sq, parameter.detach(), entry.step)
        drift[name] = ops.adam_influence(None, q[name], *rest, impl=impl)[0]
    return drift


@dataclass
class ClippingSink:
    """Holds a batch's gradients until their global norms are known, then passes them on scaled by c.

    Clipping (Eq. 1) needs ‖g_i‖ over all parameters before the first Δ, so dY of every layer stays in
    memory for the length of one batch; the head's, of all the vocabulary, is computed a second time.
    `squares` are ‖g_i‖² of what has come, float64 [B].
    """

    target: InfluenceSink
    max_grad_norm: float
    squares: Tensor
    held: dict[str, Use | RestUse] = field(default_factory=dict)

    @classmethod
    def before(cls, target: InfluenceSink, max_grad_norm: float) -> ClippingSink:
        return cls(target, max_grad_norm, target.scores.new_zeros(target.scores.shape[0]))

    def use(self, name: str, use: Use | RestUse) -> None:
        self.held[name] = use

    def part(self, _name: str, first: int, use: LinearUse, _rows: slice) -> None:
        self._add(use, slice(first, first + use.offsets.numel() - 1))

    def absent(self, name: str) -> None:
        self.target.absent(name)

    def release(self) -> None:
        """Scale and forward everything held; call once after the backward pass."""
        for use in self.held.values():
            self._add(use, slice(None))
        factors = equations.clip_factor(self.squares.sqrt(), self.max_grad_norm)
        for name in list(self.held):
            self.target.use(name, scale(self.held.pop(name), factors, partial(self.target.part, name)))

    def _add(self, use: Use | RestUse, examples: slice) -> None:
        here = self.squares[examples]
        with unrounded_products():
            here += squared_norms(use, len(here), self.target.impl).to(here.device)
