"""Sums over the rows of each example: gradients of biases and of the weights of norms."""

import triton
import triton.language as tl


@triton.jit
def example_sums_kernel(
    rows_ptr, times_ptr, scale_ptr, spans_ptr, sums_ptr, F,
    TIMES: tl.constexpr, SCALED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """sums [B, F]: Σ rows · times · scale over the rows of an example, one after the other in blocks."""
    b, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    start, end = tl.load(spans_ptr + 2 * b), tl.load(spans_ptr + 2 * b + 1)
    in_mask = columns < F
    total = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for first in range(start, end, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        given = row < end
        at, mask = row[:, None] * F + columns[None, :], given[:, None] & in_mask[None, :]
        value = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if TIMES:
            value *= tl.load(times_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(scale_ptr + row, mask=given, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(sums_ptr + b * F + columns, tl.sum(total, 0), mask=in_mask)


def example_sums_launch(rows, times, scale, spans, sums):
    """Fill sums [B, F] float32 from rows and times [N, F], scale [N] and spans int64 [B, 2]; two may be None."""
    num_examples, width = sums.shape
    block_f = min(128, triton.next_power_of_2(width))
    example_sums_kernel[(num_examples, triton.cdiv(width, block_f))](
        rows, times, scale, spans, sums, width,
        TIMES=times is not None, SCALED=scale is not None, BLOCK_T=32, BLOCK_F=block_f, num_warps=4,
    )  # fmt: skip
