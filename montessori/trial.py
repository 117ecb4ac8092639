"""The fused linear influence on the GPU at hand: random problems, the error against float64, the time.

For `montessori.calibration` and the benchmarks. Dimensions as in `montessori.ops`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from montessori import reference
from montessori.ops import SparseRows
from montessori.spans import Spans, spans_of
from montessori.steps import AdamWStep

STEP = AdamWStep(lr=1e-3, eps=1e-8, weight_decay=0.1, step=12)
NARROW, HELD = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
WAITING_CYCLES = 2_000_000  # about a millisecond
# O, I and lengths of examples. The first two are smaller than a box of the bulk copies.
CHECKED: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (24, 16, (3,)),
    (16, 264, (5, 0, 1)),
    (96, 72, (5, 0, 64, 1, 130)),
    (264, 200, (17, 64)),
    (1024, 512, (300, 1, 0, 700)),
)


@dataclass
class Problem:
    """Arguments of `linear_influence` on the device."""

    x: Tensor
    dy: Tensor
    offsets: Tensor
    q: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    param: Tensor
    rows: SparseRows | None = None

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.q, self.exp_avg, self.exp_avg_sq, self.param

    @property
    def spans(self) -> Spans:
        return spans_of(self.offsets)

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.dy, self.spans, *self.state, STEP, self.rows


def make_problem(
    shape: tuple[int, int],
    lengths: Sequence[int],
    operand: torch.dtype = torch.bfloat16,
    state: torch.dtype = torch.float32,
    sets: int = 1,
    tied: bool = False,
    seed: int = 0,
) -> Problem:
    """Random activations, and moments of the size that such gradients leave behind."""
    generator = torch.Generator("cuda").manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device="cuda")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens, scale = int(offsets[-1]), max(1, max(lengths, default=1)) ** 0.5
    rows = None
    if tied:
        ids = torch.randint(0, shape[0], (tokens,), generator=generator, device="cuda")
        rows = SparseRows(ids, normal(tokens, shape[1]).to(operand), offsets)
    return Problem(
        x=normal(tokens, shape[1]).to(operand),
        dy=normal(tokens, shape[0]).to(operand),
        offsets=offsets,
        q=normal(sets, *shape).to(state),
        exp_avg=(normal(*shape) * scale).to(state),
        exp_avg_sq=((normal(*shape) * scale) ** 2 + 0.1).to(state),
        param=normal(*shape),
        rows=rows,
    )


def specified(p: Problem, dtype: torch.dtype) -> Tensor:
    """Scores [B, K] by the specification; below float64, gradients are rounded to `dtype` as autograd's are."""
    wide = torch.promote_types(dtype, torch.float32)
    q, exp_avg, exp_avg_sq, param = (tensor.to(wide) for tensor in p.state)
    scores = []
    for low, high in p.spans:
        span = slice(low, high)
        grad = reference.linear_gradient(p.x[span].to(dtype), p.dy[span].to(dtype)).to(wide)
        if p.rows is not None:
            grad = grad.index_add(0, p.rows.ids[span], p.rows.grad[span].to(wide))
        scores.append(reference.first_order(q, reference.delta(grad, exp_avg, exp_avg_sq, param, STEP)))
    return torch.stack(scores).double()


def check(
    run: Callable[..., Tensor], operands: Iterable[torch.dtype], states: Iterable[torch.dtype], **settings: Any
) -> list[dict[str, Any]]:
    """Over CHECKED and dtypes: the relative error of `run` against float64, beside that of plain torch in the same
    dtypes; whether it is `right` (twice that at most), and whether it `repeats` to the bit."""
    rows = []
    for operand in operands:
        for state in states:
            for index, (num_out, num_in, lengths) in enumerate(CHECKED):
                p = make_problem((num_out, num_in), lengths, operand, state, seed=index, **settings)
                want, plain, got = specified(p, torch.float64), specified(p, operand), run(*p.arguments())
                again = run(*p.arguments())
                error, allowed = (float((value - want).norm() / want.norm()) for value in (got, plain))
                rows.append(
                    {"O": num_out, "I": num_in, "x": str(operand), "state": str(state), "error": error,
                     "plain": allowed, "right": bool(error <= 2 * allowed + 1e-6), "repeats": torch.equal(got, again)}
                )  # fmt: skip
    return rows


def timed(run: Callable[..., object], p: Problem) -> dict[str, float]:
    """Milliseconds of the plain dW product of the packed tokens, and of `run`; their ratio."""
    plain, ours = milliseconds(lambda: p.dy.T @ p.x), milliseconds(lambda: run(*p.arguments()))
    return {"dW ms": plain, "ms": ours, "ratio": ours / plain}


def milliseconds(work: Callable[[], object], repeats: int = 12) -> float:
    """Median time on the device of single runs after three warm-ups, without what the host takes to launch them."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Launches queue up behind it.
        torch.cuda._sleep(WAITING_CYCLES)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
