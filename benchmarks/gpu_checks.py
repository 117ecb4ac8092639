"""Every Triton kernel but the fused linear influence against float64, for `benchmarks.gpu_sections`.

`montessori.trial` checks the fused one. Each row has the largest error, and whether all are within what roundings make.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from montessori import gpu, ops, reference
from montessori.ops import SparseRows
from montessori.spans import Spans
from montessori.trial import CHECKED_STEP, STEP, make_problem

# Of the size of the terms: sums of a few hundred in float32, whose roundings have signs.
SUMS = 1e-5
# A step that shows in bfloat16 too.
LONG_STEP = replace(CHECKED_STEP, lr=0.5)
# Of a weight, and of a table; tokens of the examples.
SHAPE, LENGTHS = (300, 200), (7, 0, 40)
# Words of the vocabulary, and of a block of it: two splits of the normaliser, and a last block of odd width.
WORDS, BLOCK_WORDS = 5003, 2000
POSITIONS, FEATURES = 65, 256
FLOAT32 = torch.finfo(torch.float32)


def check_small(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Ready gradients, table rows, sums and the step itself; gradients, state and the stepped weight in `dtype`."""
    p = make_problem(SHAPE, LENGTHS, state=dtype, sets=2)
    (num_rows, width), tokens = SHAPE, sum(LENGTHS)
    generator = torch.Generator("cuda").manual_seed(1)
    normal = partial(torch.randn, generator=generator, device="cuda")
    wide = [tensor.double() for tensor in p.state]
    grad, rows, times, looked_up = (
        normal(*size, width).to(dtype) for size in ((len(LENGTHS), num_rows), *[(tokens,)] * 3)
    )
    table = SparseRows(torch.randint(0, num_rows, (tokens,), generator=generator, device="cuda"), looked_up, p.offsets)
    wide_table = replace(table, grad=looked_up.double())
    elsewhere = _gradients_from_elsewhere(table, p.spans, normal)
    wide_elsewhere = [(ids, base.double()) for ids, base in elsewhere]
    scored = {
        "ready": (ops.adam_influence(grad, *p.state, STEP, impl="triton"),
                  ops.adam_influence(grad.double(), *wide, STEP, impl="reference")),
        "table": (ops.embedding_influence(table, *p.state, STEP, impl="triton"),
                  ops.embedding_influence(wide_table, *wide, STEP, impl="reference")),
        "rows changed elsewhere too": (
            ops.row_changes(table, *p.state, CHECKED_STEP, base=elsewhere, impl="triton"),
            ops.row_changes(wide_table, *wide, CHECKED_STEP, base=wide_elsewhere, impl="reference")),
    }  # fmt: skip
    found = [_row(name, dtype, got, want, SUMS * want.norm()) for name, (got, want) in scored.items()]
    found.append(_check_sums(rows, times, torch.rand(tokens, generator=generator, device="cuda"), p.offsets, p.spans))
    found.append(_check_step(p.param.to(dtype), grad[0], p.exp_avg, p.exp_avg_sq))
    return found


def _gradients_from_elsewhere(table: SparseRows, spans: Spans, normal: Any) -> list[tuple[Tensor, Tensor]]:
    """Of the rows that an example touches, and of one more."""
    found = []
    for low, high in spans:
        ids = torch.cat([table.ids[low:high], table.ids.new_full((1,), SHAPE[0] // 2)]).unique()
        found.append((ids, normal(len(ids), table.grad.shape[1])))
    return found


def _check_sums(rows: Tensor, times: Tensor, scale: Tensor, offsets: Tensor, spans: Spans) -> dict[str, Any]:
    got = ops.example_sums(rows, offsets, times=times, scale=scale, impl="triton")
    product = rows.double() * times.double() * scale.double()[:, None]
    want, sizes = (torch.stack([part[low:high].sum(0) for low, high in spans]) for part in (product, product.abs()))
    return _row("sums", rows.dtype, got, want, SUMS * sizes)


def _check_step(source: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Any]:
    param = torch.empty_like(source)
    ops.adam_step_(param, source, grad, exp_avg, exp_avg_sq, LONG_STEP, impl="triton")
    weight, g, m, v = (tensor.double() for tensor in (source, grad, exp_avg, exp_avg_sq))
    want = weight + reference.delta(g, m, v, weight, LONG_STEP)
    # A rounding of the weight, eight of the parts of its step, and one where the sum is stored.
    parts = weight.abs() + 8 * reference.delta(g.abs(), m.abs(), v, weight.abs(), LONG_STEP).abs()
    return _row("step", source.dtype, param, want, FLOAT32.eps * parts + _stored(want, source.dtype))


def check_head(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Token losses of a vocabulary head and the gradients of its logits, with the head's factors in `dtype`."""
    generator = torch.Generator("cuda").manual_seed(2)
    normal = partial(torch.randn, generator=generator, device="cuda")
    # Logits from nearly level to such as are infinite under exp.
    spread = torch.linspace(0.1, 40, POSITIONS, device="cuda")
    hidden = (normal(POSITIONS, FEATURES) * spread[:, None]).to(dtype)
    weight = (normal(WORDS, FEATURES) / FEATURES**0.5).to(dtype)
    edges = torch.tensor([0, BLOCK_WORDS - 1, BLOCK_WORDS, WORDS - 1], device="cuda")
    targets = torch.cat([edges, torch.randint(0, WORDS, (POSITIONS - 4,), generator=generator, device="cuda")])
    scale = torch.rand(POSITIONS, generator=generator, device="cuda")
    losses, lse = gpu.linear_cross_entropy(hidden, weight, targets)
    blocks = gpu.logits_gradient(hidden, weight, targets, lse, scale, BLOCK_WORDS)
    gradient = torch.cat([block for _, block in blocks], dim=1)

    logits = hidden.double() @ weight.double().T
    # An error of a logit is one of the loss, and relative to the probability one of the gradient.
    of_logits = SUMS * (1 + logits.abs().amax(1))
    probability, indicator = logits.softmax(1), F.one_hot(targets, WORDS)
    want = scale.double()[:, None] * (probability - indicator)
    # Of the exponential, what float32 has no place for is 0.
    allowed = (scale * of_logits)[:, None] * (probability + indicator) + FLOAT32.tiny + _stored(want, dtype)
    return [
        _row("token loss", dtype, losses, F.cross_entropy(logits, targets, reduction="none"), of_logits),
        _row("normaliser", dtype, lse, logits.logsumexp(1), of_logits),
        _row("logits gradient", dtype, gradient, want, allowed),
    ]


def _stored(want: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of two numbers of this dtype, there: twice what rounding to the nearest leaves."""
    kind = torch.finfo(dtype)
    return kind.eps * want.abs().clamp(min=kind.smallest_normal)


def _row(kernel: str, dtype: torch.dtype, got: Tensor, want: Tensor, allowed: Tensor) -> dict[str, Any]:
    error = (got.double() - want).abs()
    return {"kernel": kernel, "dtype": str(dtype), "error": float(error.max()), "right": bool((error <= allowed).all())}
