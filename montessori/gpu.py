"""The Triton kernels behind `montessori.ops`, impl="triton". Dimensions as there.

Allocation, launch parameters and the constants of the step; the device code is `montessori.kernels.triton`,
tile shapes come from `montessori.tiles`. Arguments are trusted here; `montessori.ops` has checked them.
Triton is imported when an operation runs, not before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from montessori import tiles
from montessori.products import gpu_rounds_products
from montessori.spans import Spans, spans_on, steps_on
from montessori.steps import AdamWStep, OptimizerStep

if TYPE_CHECKING:
    from montessori.ops import SparseRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Major compute capabilities on which a missing fence has made products of other Triton kernels wrong, and the first
# Triton that sets it (docs/kernels.md).
FENCED, LEAST_FENCING = (10, 11), (3, 7, 1)
_SMALLEST = 2 * torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class StepMap:
    """A step as the kernels see it: Δ(g) = −lr · [ update(g + l2 θ) + decay θ ], see kernels/triton/update.py.

    `constants` are a1, a2, s1, s2, eps, decay, l2; `flags` say which of them can be other than 0. All numbers are
    Python's floats: Triton's launcher takes no NumPy scalar, and compiles a variant for an int of 1.
    """

    lr: float
    constants: tuple[float, ...]
    flags: dict[str, bool]

    @classmethod
    def of(cls, step: OptimizerStep, exp_avg: Tensor | None) -> StepMap:
        if isinstance(step, AdamWStep):
            decay, l2 = (step.weight_decay, 0.0) if step.decoupled else (0.0, step.weight_decay)
            a1, a2, s1, s2, eps = step.folded
            # Lanes beyond a tensor have v = 1, and a quotient of 0 / s1 there.
            constants = (a1, a2, s1 or _SMALLEST, s2, eps, decay, l2)
            return cls._of_floats(step.lr, constants, ADAM=True, MOMENT=True, DECAY=decay != 0, L2=l2 != 0)
        on_grad, on_buffer = step.line(buffered=step.step > 1 and exp_avg is not None)
        decay = step.weight_decay * on_grad
        constants = (on_buffer, on_grad, 0.0, 0.0, 0.0, decay, 0.0)
        return cls._of_floats(step.lr, constants, ADAM=False, MOMENT=on_buffer != 0, DECAY=decay != 0, L2=False)

    @classmethod
    def _of_floats(cls, lr: float, constants: Iterable[float], **flags: bool) -> StepMap:
        return cls(float(lr), tuple(map(float, constants)), {name: bool(flag) for name, flag in flags.items()})


def unavailable() -> str | None:
    """Why the Triton kernels cannot be used in this process, None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why these arguments are not for the Triton kernels, None when they are."""
    reason = unavailable()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            return f"it runs on a GPU, got a tensor on {tensor.device}"
    reason = of_other_dtypes(*tensors)
    if reason is not None:
        return reason
    devices = {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}
    return next(filter(None, map(too_old, devices)), None)


def of_other_dtypes(*tensors: Tensor | None) -> str | None:
    """Why the kernels are not for the dtypes of these tensors, None when they are."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"it computes in float32 from float32, bfloat16 or float16, got {tensor.dtype}"
    return None


def too_old(device: torch.device) -> str | None:
    """Why the kernels are not for this CUDA device, None when they are."""
    if tiles.capability(device)[0] in FENCED and triton_version() < LEAST_FENCING:
        return (
            f"this Triton, {'.'.join(map(str, triton_version()))}, leaves out a fence between copies and products that "
            f"{device} needs: install triton {'.'.join(map(str, LEAST_FENCING))} or later"
        )
    least, found = (".".join(map(str, kind)) for kind in (tiles.LEAST_CAPABILITY, tiles.capability(device)))
    if tiles.capability(device) < tiles.LEAST_CAPABILITY:
        return f"it runs on compute capability {least} and later, {device} has {found}"
    return None


def triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())


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
    tile: tiles.Tile | None = None,
) -> Tensor:
    """Eq. 5 tile by tile; see `montessori.ops.linear_influence`. `tile` is for measurements."""
    (num_out, num_in), num_examples, num_sets = param.shape, len(spans), q.shape[0]
    if 0 in (num_out, num_in, num_examples, num_sets):
        return q.new_zeros(num_examples, num_sets, dtype=torch.float64)
    from montessori.kernels.triton.linear import linear_influence_launch

    x, dy = _factors(x, dy)
    tile = tile or tiles.choose_tile(x, param.shape)
    tiles_o, tiles_i = -(-num_out // tile.block_o), -(-num_in // tile.block_i)
    partial = _partials(q, num_sets, num_examples, tiles_o * tiles_i)
    step_map = StepMap.of(step, exp_avg)
    table = (None, None, None) if rows is None else _rows_by_tile(rows, num_out, tile.block_o)
    with _on(param):
        linear_influence_launch(
            x, dy, spans_on(tuple(spans), x.device), q.contiguous(), *_contiguous(exp_avg, exp_avg_sq, param),
            table, partial, step_map.constants, step_map.flags, tile,
            tiles.examples_per_program(tiles_o * tiles_i, num_examples, x.device), _dot_precision(),
        )  # fmt: skip
    return _total(partial, steps_on(num_examples, partial.shape[2], x.device)).mul_(-step_map.lr)


def _rows_by_tile(rows: SparseRows, num_out: int, block_o: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by example and id, and bounds int32 [B, tiles_o + 1] of each row of tiles."""
    key = _example_of(rows) * num_out + rows.ids
    key, order = key.sort(stable=True)
    first = torch.arange(0, num_out + block_o, block_o, device=key.device).clamp(max=num_out)
    example = torch.arange(rows.offsets.numel() - 1, device=key.device)
    bounds = torch.searchsorted(key, example[:, None] * num_out + first)
    return rows.ids[order].int(), rows.grad[order].contiguous(), bounds.int()


def row_changes(
    rows: SparseRows,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    base: Sequence[tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """f(h + g) − f(h), one program per touched row; see `montessori.ops.row_changes`."""
    (num_rows, width), num_examples = param.shape, rows.offsets.numel() - 1
    if 0 in (rows.ids.numel(), width, q.shape[0]):
        return q.new_zeros(num_examples, q.shape[0], dtype=torch.float64)
    from montessori.kernels.triton.embedding import row_changes_launch

    key, order = (_example_of(rows) * num_rows + rows.ids).sort(stable=True)
    segments, counts = torch.unique_consecutive(key, return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    per_row = -(-width // tiles.BLOCK_ELEMENTS)
    partial = _partials(q, q.shape[0], segments.numel(), per_row)
    step_map = StepMap.of(step, exp_avg)
    table: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if base is not None:
        base_key = torch.cat([ids + example * num_rows for example, (ids, _) in enumerate(base)])
        table = torch.searchsorted(base_key, segments), torch.cat([grad for _, grad in base])
    with _on(param):
        row_changes_launch(
            order, starts, segments % num_rows, rows.grad.contiguous(), *table, q.contiguous(),
            *_contiguous(exp_avg, exp_avg_sq, param), partial, step_map.constants, step_map.flags,
            min(tiles.BLOCK_ELEMENTS, _power_of_2(width)),
        )  # fmt: skip
    example = torch.arange(num_examples + 1, device=key.device)
    return _total(partial, torch.searchsorted(segments, example * num_rows) * per_row).mul_(-step_map.lr)


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
        grad = torch.zeros_like(param)[None]
    num_examples, num_sets, size = grad.shape[0], q.shape[0], param.numel()
    if 0 in (num_examples, num_sets, size):
        return q.new_zeros(num_examples, num_sets, dtype=torch.float64)
    from montessori.kernels.triton.elementwise import adam_influence_launch

    partial = _partials(q, num_sets, num_examples, -(-size // tiles.BLOCK_ELEMENTS))
    step_map = StepMap.of(step, exp_avg)
    with _on(param):
        adam_influence_launch(
            grad.reshape(num_examples, size).contiguous(), q.contiguous(), *_contiguous(exp_avg, exp_avg_sq, param),
            partial, step_map.constants, step_map.flags, tiles.BLOCK_ELEMENTS,
            tiles.examples_per_program(partial.shape[2], num_examples, param.device),
        )  # fmt: skip
    return _total(partial, steps_on(num_examples, partial.shape[2], param.device)).mul_(-step_map.lr)


def adam_step_(
    param: Tensor,
    source: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: OptimizerStep,
) -> None:
    """param = source + Δ(grad) in one pass; see `montessori.ops.adam_step_`."""
    if param.numel() == 0:
        return
    from montessori.kernels.triton.elementwise import adam_step_launch

    step_map = StepMap.of(step, exp_avg)
    source, grad = source.contiguous(), grad.contiguous()
    with _on(param):
        adam_step_launch(
            param, source, grad, *_contiguous(exp_avg, exp_avg_sq), step_map.lr, step_map.constants, step_map.flags,
            tiles.BLOCK_ELEMENTS,
        )  # fmt: skip


def example_sums(rows: Tensor, spans: Spans, times: Tensor | None, scale: Tensor | None) -> Tensor:
    """Sums of each example's rows; see `montessori.ops.example_sums`."""
    sums = rows.new_empty(len(spans), *rows.shape[1:], dtype=torch.float32)
    if sums.numel():
        from montessori.kernels.triton.rows import example_sums_launch

        spans_there = spans_on(tuple(spans), rows.device)
        with _on(rows):
            example_sums_launch(*_contiguous(rows, times, scale), spans_there, sums.view(len(spans), -1))
    return sums


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses and log Σ exp of the logits, float32 [n] each, without the logits in memory.

    hidden [n, H] at label positions, weight [V, H], targets int64 [n] within the vocabulary.
    """
    num_rows = hidden.shape[0]
    if num_rows == 0:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    from montessori.kernels.triton.cross_entropy import linear_cross_entropy_launch

    hidden, weight = _factors(hidden, weight)
    tile = tiles.choose_logits_tile(hidden)
    words_per_split = tile.block_i * tiles.WORD_BLOCKS
    highest, total = hidden.new_empty(2, -(-weight.shape[0] // words_per_split), num_rows, dtype=torch.float32)
    target_logit = hidden.new_empty(num_rows, dtype=torch.float32)
    with _on(hidden):
        linear_cross_entropy_launch(
            hidden, weight, targets, highest, total, target_logit, words_per_split, tile, _dot_precision()
        )
    lse = torch.logsumexp(highest + total.log(), dim=0)
    return lse - target_logit, lse


def logits_gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, num_words: int
) -> Iterator[tuple[slice, Tensor]]:
    """Gradients [n, words] of Σ scale · loss on the logits, `num_words` words at a time, with their span.

    `lse` from `linear_cross_entropy`, `scale` [n]. Each block, in the dtype of `hidden`, is the dY of the same rows of
    the head's weight, which `montessori.ops.linear_influence` scores; its product with those rows of the weight adds
    to dX.
    """
    from montessori.kernels.triton.cross_entropy import logits_gradient_launch

    dtype, scale = hidden.dtype, scale.float().contiguous()
    hidden, weight = _factors(hidden, weight)
    tile = tiles.choose_logits_tile(hidden)
    for first in range(0, weight.shape[0], num_words):
        span = slice(first, min(first + num_words, weight.shape[0]))
        grad = hidden.new_empty(hidden.shape[0], span.stop - first, dtype=dtype)
        if grad.numel():
            with _on(hidden):
                logits_gradient_launch(hidden, weight, targets, lse, scale, grad, first, tile, _dot_precision())
        yield span, grad


def _partials(like: Tensor, num_sets: int, num_parts: int, num_tiles: int) -> Tensor:
    return like.new_empty(num_sets, num_parts, num_tiles, dtype=torch.float32)


def _total(partial: Tensor, offsets: Tensor) -> Tensor:
    """Scores float64 [B, K]: the sums of partial [K, parts, tiles], as [K, n], between the offsets [B+1]."""
    from montessori.kernels.triton.partials import sum_partials_launch

    scores = partial.new_empty(offsets.numel() - 1, partial.shape[0], dtype=torch.float64)
    with _on(partial):
        sum_partials_launch(partial.flatten(1), offsets, scores)
    return scores


def _example_of(rows: SparseRows) -> Tensor:
    """Example of each sparse row, int64 [T] on the rows' device."""
    counts = rows.offsets.to(rows.ids.device).diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


def _factors(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel multiplies: contiguous, in the dtype that holds both."""
    common = torch.promote_types(first.dtype, second.dtype)
    return first.to(common).contiguous(), second.to(common).contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _dot_precision() -> str:
    """Float32 products follow torch's own switch; narrower ones are exact products either way."""
    return "tf32" if gpu_rounds_products() else "ieee"


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
