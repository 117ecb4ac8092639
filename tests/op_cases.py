"""Cases of `montessori.ops`, ragged and hostile, and how far from the specification a result may be.

How far apart two correct results may be is computed per element of the score by `Case.allowed`.
Dimensions: B examples, T tokens, O output features, I input features, K reference sets, V table rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from montessori import AdamWStep, SGDStep, cpu, ops, reference
from montessori.errors import ArgumentError
from montessori.ops import SparseRows
from montessori.steps import OptimizerStep

ADAMW = AdamWStep(lr=0.01, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1, step=7)
STEPS = {
    "adamw": ADAMW,
    "adamw_no_decay": replace(ADAMW, weight_decay=0.0),
    "adamw_first_step": replace(ADAMW, step=1),
    "adam_l2": replace(ADAMW, decoupled=False),
    "sgd": SGDStep(lr=0.1),
    "sgd_decay": SGDStep(lr=0.1, weight_decay=0.2),
    "sgd_momentum": SGDStep(lr=0.1, momentum=0.9, dampening=0.3, step=5),
    "sgd_first_step": SGDStep(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
    "sgd_full_dampening": SGDStep(lr=0.1, momentum=0.9, dampening=1.0, step=5),
    "sgd_undamped": SGDStep(lr=0.1, momentum=1.0, step=5),
    "nesterov": SGDStep(lr=0.1, momentum=0.9, weight_decay=0.2, nesterov=True, step=5),
    "nesterov_first_step": SGDStep(lr=0.1, momentum=0.9, nesterov=True),
}
every_impl = pytest.mark.parametrize("impl", ops.available_impls())
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def simd_levels() -> list[str]:
    """Instruction sets of this processor that a CPU kernel exists for."""
    if cpu.unavailable() is not None:
        return ["baseline"]
    return [level for level in cpu.KERNELS if _runs(level)]


def _runs(level: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONTESSORI_SIMD", level)
        try:
            torch.ops.montessori.tile_norms(torch.ones(1, 1, 1))
        except RuntimeError:
            return False
    return True


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass
class Case:
    """Arguments of one operation; `grads` [B, *shape] are the whole gradients that it must imply."""

    q: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    param: Tensor
    step: OptimizerStep
    x: Tensor | None = None
    dy: Tensor | None = None
    offsets: Tensor | None = None
    rows: SparseRows | None = None
    starts: Tensor | None = None
    ready: Tensor | None = None

    @property
    def state(self) -> tuple:
        return self.q, self.exp_avg, self.exp_avg_sq, self.param, self.step

    def to(self, dtype: torch.dtype) -> Case:
        """Every tensor of floating point in `dtype`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {k: v.to(dtype) for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        rows = self.rows and replace(self.rows, grad=self.rows.grad.to(dtype))
        return replace(self, **moved, rows=rows)

    def grads(self, magnitude: bool = False) -> Tensor:
        """Dense gradients; with `magnitude`, the sum of the absolute values of what is added up."""
        keep = torch.abs if magnitude else lambda tensor: tensor
        if self.ready is not None:
            return keep(self.ready)
        offsets = self.offsets if self.offsets is not None else self.rows.offsets
        dense = self.param.new_zeros(len(offsets) - 1, *self.param.shape)
        for example in range(len(dense)):
            if self.x is not None:
                span = slice(*self.offsets[example : example + 2].tolist())
                dense[example] += reference.linear_gradient(keep(self.x[span]), keep(self.dy[span]))
            if self.rows is not None:
                span = slice(*self.rows.offsets[example : example + 2].tolist())
                dense[example] += reference.embedding_gradient(
                    self.rows.ids[span], keep(self.rows.grad[span]), len(self.param)
                )
        return dense

    def specified(self) -> Tensor:
        """Scores [B, K] by montessori.reference, in the dtype of the case."""
        state = self.exp_avg, self.exp_avg_sq, self.param, self.step
        scores = [reference.first_order(self.q, reference.delta(grad, *state)) for grad in self.grads()]
        return torch.stack(scores) if scores else self.q.new_zeros(0, len(self.q))

    def run(self, **options) -> Tensor:
        if self.ready is not None:
            return ops.adam_influence(self.ready, *self.state, **options)
        if self.x is None:
            return ops.embedding_influence(self.rows, *self.state, **options)
        options |= {"rows": self.rows, "starts": self.starts}
        return ops.linear_influence(self.x, self.dy, self.offsets, *self.state, **options)

    def allowed(self, dtype: torch.dtype) -> Tensor:
        """Error [B, K] that arithmetic in `dtype` may make: twice the plain path's own, and a rounding band.

        Band: each of the terms q·Δ comes from some 8 roundings of its parts, taken without cancellation
        (Δ of absolute values), and each element of a gradient from T + 1 roundings of its products, which
        Δ passes on with its slope dΔ/dg. Roundings of a long sum are fewer than that: they have signs.
        """
        wide, unit = self.to(torch.float64), torch.finfo(dtype).eps / 2
        plain = (self.to(dtype).specified().double() - wide.specified()).abs()
        grads, sizes = wide.grads().requires_grad_(), wide.grads(magnitude=True)
        terms = 1 + max((self.offsets if self.offsets is not None else torch.tensor([0])).diff().tolist(), default=0)
        terms += 0 if self.rows is None else len(self.rows.ids)
        state = wide.exp_avg, wide.exp_avg_sq, wide.param, wide.step
        (slopes,) = torch.autograd.grad(reference.delta(grads, *state).sum(), grads)
        moments = wide.exp_avg.abs() if wide.exp_avg is not None else None
        parts = reference.delta(grads.detach().abs(), moments, wide.exp_avg_sq, wide.param.abs(), wide.step)
        per_element = 8 * parts.abs() + terms * sizes * slopes.abs()
        return 2 * plain + unit * torch.einsum("k...,b...->bk", wide.q.abs(), per_element)


def make_state(shape: tuple[int, ...], sets: int, step: OptimizerStep, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sets, *shape, dtype=torch.float64, generator=generator)
    exp_avg, param = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    # Away from 0, where √ has no slope and the band none either.
    exp_avg_sq = 0.1 + torch.rand(shape, dtype=torch.float64, generator=generator)
    needs_momentum = isinstance(step, AdamWStep) or step.momentum
    return {
        "q": q,
        "exp_avg": exp_avg if needs_momentum else None,
        "exp_avg_sq": exp_avg_sq if isinstance(step, AdamWStep) else None,
        "param": param,
        "step": step,
    }


def make_rows(lengths: tuple[int, ...], table: int, width: int, seed: int = 7) -> SparseRows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, table, (sum(lengths),), generator=generator)
    return SparseRows(ids, torch.randn(len(ids), width, dtype=torch.float64, generator=generator), bounds(*lengths))


def linear_case(lengths, num_out=5, num_in=3, sets=2, step=ADAMW, tied=None) -> Case:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(lengths), num_in, dtype=torch.float64, generator=generator)
    dy = torch.randn(sum(lengths), num_out, dtype=torch.float64, generator=generator)
    rows = make_rows(tied, num_out, num_in) if tied is not None else None
    state = make_state((num_out, num_in), sets, step)
    return Case(**state, x=x, dy=dy, offsets=bounds(*lengths), rows=rows)


def with_padding(case: Case) -> Case:
    """The same examples with padding before, between and after them, of values that would show."""
    starts, gaps = case.offsets[:-1].clone(), [2, 0, 5, 1]
    for example in range(len(starts)):
        starts[example:] += gaps[example % len(gaps)]
    total = int(case.offsets[-1]) + sum(gaps[example % len(gaps)] for example in range(len(starts))) + 3
    x, dy = (t.new_full((total, t.shape[1]), torch.nan) for t in (case.x, case.dy))
    for start, (low, high) in zip(starts.tolist(), pairwise(case.offsets.tolist()), strict=True):
        x[start : start + high - low], dy[start : start + high - low] = case.x[low:high], case.dy[low:high]
    return replace(case, x=x, dy=dy, starts=starts)


def embedding_case(lengths, table=9, width=4, sets=2, step=ADAMW) -> Case:
    return Case(**make_state((table, width), sets, step), rows=make_rows(lengths, table, width))


def ready_case(shape, size=4, sets=2, step=ADAMW) -> Case:
    grads = torch.randn(size, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return Case(**make_state(shape, sets, step), ready=grads)


def assert_specified(case: Case, dtype: torch.dtype, impl: str = "auto") -> None:
    """The result of inputs in `dtype` is as close to the one specified in float64 as it has to be.

    Arithmetic on inputs narrower than float32 is that of float32, so they get no more room.
    """
    given = case.to(dtype)
    if dtype is torch.float64 and impl in ("cpu", "triton"):
        with pytest.raises(ArgumentError, match=f"impl='{impl}': "):
            given.run(impl=impl)
        return
    want, got = given.to(torch.float64).specified(), given.run(impl=impl)
    assert got.dtype is torch.float64
    assert got.shape == want.shape
    assert torch.all((got - want).abs() <= given.allowed(torch.promote_types(dtype, torch.float32)))


HOSTILE = {
    "ordinary": linear_case((4, 1, 7)),
    "one_token": linear_case((1,)),
    "one_output": linear_case((3, 2), num_out=1),
    "one_input": linear_case((3, 2), num_in=1),
    "one_of_everything": linear_case((1,), num_out=1, num_in=1, sets=1),
    "empty_in_the_middle": linear_case((3, 0, 2)),
    "empty_at_both_ends": linear_case((0, 4, 0)),
    "all_empty": linear_case((0, 0, 0)),
    "no_example": linear_case(()),
    "no_output": linear_case((2, 1), num_out=0),
    "one_set": linear_case((2, 5), sets=1),
    "three_sets": linear_case((2, 5), sets=3),
    "many_of_one_token": linear_case((1,) * 2000, num_out=3, num_in=2),
    "long": linear_case((700, 2)),
    "tied": linear_case((3, 2, 4), tied=(5, 1, 9)),
    "tied_with_nothing_looked_up": linear_case((3, 2), tied=(0, 0)),
    "tied_with_no_token": linear_case((0, 0), tied=(6, 0)),
    "table": embedding_case((5, 0, 30)),
    "table_nothing_touched": embedding_case((0, 0)),
    "table_no_example": embedding_case(()),
    "table_of_one_row": embedding_case((3, 1), table=1, width=1),
    "scalar": ready_case(()),
    "vector": ready_case((6,)),
    "matrix": ready_case((3, 5)),
    "three_dimensions": ready_case((2, 3, 4)),
    "no_ready_gradient": ready_case((3,), size=0),
    "no_element": ready_case((0,)),
}
hostile = pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)


def assert_step_specified(shape: tuple[int, ...], step: OptimizerStep, dtype: torch.dtype, impl: str) -> None:
    """The step taken in place, on itself and from a source that stays, within rounding of Eq. 1 in float64."""
    case = replace(ready_case(shape, size=1), **make_state(shape, 1, step)).to(dtype)
    state = (case.exp_avg, case.exp_avg_sq)
    param, source = torch.full_like(case.param, torch.nan), case.param.clone()
    ops.adam_step_(param, source, case.ready[0], *state, step, impl=impl)
    wide = [None if t is None else t.double() for t in (case.ready[0], *state, case.param)]
    narrow = [None if t is None else t.float() for t in (case.ready[0], *state, case.param)]
    plain = narrow[3] + reference.delta(*narrow, step)
    want = wide[3] + reference.delta(*wide, step)
    # Twice the plain path's error, and a rounding of every part: the weight and the eight of its step.
    parts = wide[3].abs() + 8 * (want - wide[3]).abs() + 8 * step.lr * wide[0].abs()
    allowed = 2 * (plain - want).abs() + parts * torch.finfo(torch.float32).eps
    if dtype is not torch.float32:
        allowed += want.abs() * torch.finfo(dtype).eps
    assert torch.all((param - want).abs() <= allowed)
    assert torch.equal(source, case.param)
    again = source.clone()
    ops.adam_step_(again, again, case.ready[0], *state, step, impl=impl)
    assert torch.equal(again, param)


SUMS = {
    "ordinary": ((4, 0, 9, 1), (5,)),
    "scalar": ((3, 2), ()),
    "matrix": ((2, 37), (3, 150)),
    "all_empty": ((0, 0), (4,)),
    "no_example": ((), (4,)),
    "no_element": ((2,), (0,)),
}


def assert_sums_specified(name: str, dtype: torch.dtype, impl: str) -> None:
    """Sums of rows, of products and of scaled products, with padding between, as float64 has them."""
    lengths, shape = SUMS[name]
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(sum(lengths), *size, generator=generator).to(dtype) for size in (shape, shape, ())]
    offsets = bounds(*lengths)
    starts = offsets[:-1] + 2 * torch.arange(1, len(offsets))
    total = int(offsets[-1]) + 2 * len(offsets)
    padded = [tensor.new_full((total, *tensor.shape[1:]), torch.nan) for tensor in given]
    for start, (low, high) in zip(starts.tolist(), pairwise(offsets.tolist()), strict=True):
        for whole, tensor in zip(padded, given, strict=True):
            whole[start : start + high - low] = tensor[low:high]
    for taken in (1, 2, 3):
        names = ("rows", "times", "scale")[:taken]
        arguments = dict(zip(names, given, strict=False))
        got = ops.example_sums(**arguments, offsets=offsets, impl=impl)
        product = given[0].double()
        for factor in given[1:taken]:
            product = product * factor.double().reshape(*factor.shape, *[1] * (product.dim() - factor.dim()))
        parts = [product[low:high] for low, high in pairwise(offsets.tolist())]
        want = torch.stack([part.sum(0) for part in parts]) if parts else product.new_zeros(0, *shape)
        sizes = torch.stack([part.abs().sum(0) for part in parts]) if parts else want
        assert got.shape == want.shape
        assert got.dtype is torch.promote_types(dtype, torch.float32)
        # Two roundings of each product and one for each sum.
        assert torch.all((got - want).abs() <= (max(lengths, default=0) + 3) * torch.finfo(got.dtype).eps * sizes)
        with_gaps = dict(zip(names, padded, strict=False))
        assert torch.equal(ops.example_sums(**with_gaps, offsets=offsets, starts=starts, impl=impl), got)
