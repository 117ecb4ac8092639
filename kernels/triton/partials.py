"""The last sum: partial scores of tiles or table rows to one float64 score per example and set."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_sets", "size"])
def sum_partials_kernel(partial_ptr, offsets_ptr, scores_ptr, num_sets, size, BLOCK: tl.constexpr):
    """scores[b, k] = Σ partial[k, offsets[b] : offsets[b+1]], in an order that depends on their number alone."""
    b, k = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(offsets_ptr + b), tl.load(offsets_ptr + b + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for low in range(start, end, BLOCK):
        at = low + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + tl.cast(k, tl.int64) * size + at, mask=at < end, other=0.0).to(tl.float64)
    tl.store(scores_ptr + b * num_sets + k, tl.sum(total))


def sum_partials_launch(partial, offsets, scores):
    """scores [B, K] float64 from partial [K, n] float32 and offsets [B+1] int64 into n."""
    num_examples, num_sets = scores.shape
    sum_partials_kernel[(num_examples, num_sets)](partial, offsets, scores, num_sets, partial.shape[1], BLOCK=512)
