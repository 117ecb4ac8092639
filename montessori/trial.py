"""The fused linear influence on the GPU at hand: random problems, the error against float64, the time.

For `montessori.calibration` and the benchmarks. Dimensions as in `montessori.ops`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from montessori import reference
from montessori.ops import SparseRows
from montessori.spans import Spans, spans_of
from montessori.steps import AdamWStep

STEP = AdamWStep(lr=1e-3, eps=1e-8, weight_decay=0.1, step=12)
# An ε that tells: with 1e-8 no check would see it.
CHECKED_STEP = replace(STEP, eps=0.5)
NARROW, HELD = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
DEVICE = "cuda"
WAITING_CYCLES = 2_000_000  # about a millisecond
# O, I, lengths of examples and rows of padding after each. The first two are smaller than a box of the bulk copies.
CHECKED: tuple[tuple[int, int, tuple[int, ...], int], ...] = (
    (24, 16, (3,), 0),
    (16, 264, (5, 0, 1), 2),
    (96, 72, (5, 0, 64, 1, 130), 0),
    (264, 200, (17, 64), 11),
    (1024, 512, (300, 1, 0, 700), 0),
)
# In the cases before, the many processors of a device share out the examples of every tile, one for each. Here are more
# tiles than an A100, H100 or H200 has processors: a block goes through all examples of its tile, and then through
# another tile.
CROWDED = (1544, 1416, (70, 3, 0, 129, 64, 17, 200, 1, 128), 5)
# Scores are compared by the size of their terms. Those of float32 err by some roundings, each term for itself.
ROUNDINGS = 16 * torch.finfo(torch.float32).eps
# Gradients of narrow factors are sums of float32. Tensor cores cut off what does not fit, at most 2^-23 of a sum for
# every 16 tokens; one wrong element in fewer than a hundred million is more.
SUMMED = 1e-4


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
    starts: Tensor | None = None
    step: AdamWStep = STEP

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.q, self.exp_avg, self.exp_avg_sq, self.param

    @property
    def spans(self) -> Spans:
        return spans_of(self.offsets, self.starts)

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.dy, self.spans, *self.state, self.step, self.rows


def make_problem(
    shape: tuple[int, int],
    lengths: Sequence[int],
    operand: torch.dtype = torch.bfloat16,
    state: torch.dtype = torch.float32,
    sets: int = 1,
    tied: bool = False,
    seed: int = 0,
    device: str = DEVICE,
) -> Problem:
    """Random activations, and moments of the size that such gradients leave behind."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens, scale = int(offsets[-1]), max(1, max(lengths, default=1)) ** 0.5
    rows = None
    if tied:
        ids = torch.randint(0, shape[0], (tokens,), generator=generator, device=device)
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


def hardened(p: Problem, padding: int) -> Problem:
    """`p` with what a kernel can get wrong unseen: an ε that counts, outputs without moments, of which half have no
    gradient either, and after each example `padding` rows that belong to none and are NaN."""
    fresh = torch.arange(len(p.param), device=p.param.device) % 4 == 0
    still = torch.arange(len(p.param), device=p.param.device) % 8 == 0
    lengths = p.offsets.diff()
    starts = p.offsets[:-1] + padding * torch.arange(len(lengths))
    places = torch.arange(len(p.x)) + padding * torch.arange(len(lengths)).repeat_interleave(lengths)
    places = places.to(p.x.device)

    def spread(rows: Tensor) -> Tensor:
        wide = rows.new_full((len(rows) + padding * len(lengths), rows.shape[1]), math.nan)
        return wide.index_copy(0, places, rows)

    return replace(
        p,
        x=spread(p.x),
        dy=spread(p.dy.masked_fill(still, 0)),
        exp_avg=p.exp_avg.masked_fill(fresh[:, None], 0),
        exp_avg_sq=p.exp_avg_sq.masked_fill(fresh[:, None], 0),
        starts=starts,
        step=CHECKED_STEP,
    )


def specified(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores [B, K] by the specification, and the root of the sum of their squared terms; below float64, gradients are
    rounded to `dtype` as autograd's are."""
    wide = torch.promote_types(dtype, torch.float32)
    q, exp_avg, exp_avg_sq, param = (tensor.to(wide) for tensor in p.state)
    scores, sizes = [], []
    for (low, high), packed in zip(p.spans, spans_of(p.offsets), strict=True):
        grad = reference.linear_gradient(p.x[low:high].to(dtype), p.dy[low:high].to(dtype)).to(wide)
        if p.rows is not None:
            own = slice(*packed)
            grad = grad.index_add(0, p.rows.ids[own], p.rows.grad[own].to(wide))
        delta = reference.delta(grad, exp_avg, exp_avg_sq, param, p.step)
        scores.append(reference.first_order(q, delta))
        sizes.append((q * delta).square().sum((1, 2)).sqrt())
    return torch.stack(scores).double(), torch.stack(sizes).double()


def check(
    run: Callable[..., Tensor], operands: Iterable[torch.dtype], states: Iterable[torch.dtype], **settings: Any
) -> list[dict[str, Any]]:
    """Over `cases` and dtypes: the largest error of `run` against float64 by the size of a score's terms, beside that
    of plain torch in the same dtypes; whether it is `right` (twice that at most, and no more than sums of float32
    have), `repeats` to the bit, and stays `apart`: a NaN of one example changes no bit of another's score."""
    rows = []
    for operand in operands:
        for state in states:
            for index, (num_out, num_in, lengths, padding) in enumerate(cases(settings.get("device", DEVICE))):
                p = make_problem((num_out, num_in), lengths, operand, state, seed=index, **settings)
                p = hardened(p, padding)
                got, again = run(*p.arguments()), run(*p.arguments())
                rows.append(
                    {"O": num_out, "I": num_in, "x": str(operand), "state": str(state), **_errors(p, operand, got),
                     "repeats": torch.equal(got, again), "apart": _stays_apart(run, p, got)}
                )  # fmt: skip
    return rows


def cases(device: str) -> Sequence[tuple[int, int, tuple[int, ...], int]]:
    """What is checked there; on a processor, where nothing shares out, without CROWDED."""
    return (*CHECKED, CROWDED) if device == DEVICE else CHECKED


def spot_check(run: Callable[..., Tensor], p: Problem) -> dict[str, Any]:
    """As of `check`, of the first, the middle and the last example of a large problem."""
    few = sorted({0, len(p.offsets) // 2 - 1, len(p.offsets) - 2})
    starts, lengths = p.offsets[few], p.offsets.diff()[few]
    some = replace(p, offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), starts=starts)
    return _errors(some, p.x.dtype, run(*p.arguments())[few])


def failures(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `check` that a kernel must not have."""
    return [row for row in rows if not all(row.get(told, True) for told in ("right", "repeats", "apart"))]


def _errors(p: Problem, operand: torch.dtype, got: Tensor) -> dict[str, Any]:
    want, sizes = specified(p, torch.float64)
    plain = specified(p, operand)[0]
    error, of_plain = (float(((scores - want).abs() / sizes).max()) for scores in (got, plain))
    return {"error": error, "plain": of_plain, "right": error <= min(2 * of_plain + ROUNDINGS, SUMMED)}


def _stays_apart(run: Callable[..., Tensor], p: Problem, scores: Tensor) -> bool:
    longest = int(p.offsets.diff().argmax())
    low, high = p.spans[longest]
    spoiled = replace(p, x=p.x.clone(), dy=p.dy.clone())
    spoiled.x[high - 1], spoiled.dy[low] = math.nan, math.nan
    got = run(*spoiled.arguments())
    others = [example for example in range(len(scores)) if example != longest]
    return bool(got[longest].isnan().all()) and torch.equal(got[others], scores[others])


def timed(run: Callable[..., object], p: Problem, waiting_cycles: int = WAITING_CYCLES) -> dict[str, float]:
    """Milliseconds of the plain dW product of the packed tokens, and of `run`; their ratio."""
    plain = milliseconds(lambda: p.dy.T @ p.x)
    ours = milliseconds(lambda: run(*p.arguments()), waiting_cycles=waiting_cycles)
    return {"dW ms": plain, "ms": ours, "ratio": ours / plain}


def milliseconds(work: Callable[[], object], repeats: int = 12, waiting_cycles: int = WAITING_CYCLES) -> float:
    """Median time on the device of single runs after three warm-ups, without what the host takes to launch them: the
    device waits for `waiting_cycles` first."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Launches queue up behind it.
        torch.cuda._sleep(waiting_cycles)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
