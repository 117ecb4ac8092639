"""Cross-entropy of a vocabulary head without its logits in memory (rows are label positions only).

Letters: n label positions, H hidden features, V words, S splits of the vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, rows, words, row_mask, word_mask, H,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_N, BLOCK_V] in float32; −inf for words outside the vocabulary."""
    feature = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * H + feature[None, :]
    weight_ptrs = weight_ptr + words.to(tl.int64)[:, None] * H + feature[None, :]
    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for done in range(0, H, BLOCK_H):
        given = (feature < H - done)[None, :]
        hidden = tl.load(hidden_ptrs, mask=row_mask[:, None] & given, other=0.0)
        weight = tl.load(weight_ptrs, mask=word_mask[:, None] & given, other=0.0)
        logits = tl.dot(hidden, tl.trans(weight), logits, input_precision=PRECISION)
        hidden_ptrs += BLOCK_H
        weight_ptrs += BLOCK_H
    return tl.where(word_mask[None, :], logits, float("-inf"))


# What has a number for each row starts at any row of a batch: a variant for rows at 16 bytes would only take time to
# compile, as would one for each kind of the whole numbers.
@triton.jit(
    do_not_specialize=["n", "V", "words_per_split"],
    do_not_specialize_on_alignment=["targets_ptr", "highest_ptr", "total_ptr", "target_logit_ptr"],
)
def linear_cross_entropy_kernel(
    hidden_ptr, weight_ptr, targets_ptr, highest_ptr, total_ptr, target_logit_ptr, n, H, V, words_per_split,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row and split [S, n]: highest logit and Σ exp(logit − highest); and the target's logit [n]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < n
    targets = tl.load(targets_ptr + rows, mask=row_mask, other=-1)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    start = tl.program_id(1) * words_per_split
    for first in range(start, tl.minimum(start + words_per_split, V), BLOCK_V):
        words = first + tl.arange(0, BLOCK_V)
        logits = logits_tile(
            hidden_ptr, weight_ptr, rows, words, row_mask, words < V, H, BLOCK_N, BLOCK_V, BLOCK_H, PRECISION
        )
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
        found = words[None, :] == targets[:, None]
        tl.store(
            target_logit_ptr + rows, tl.sum(tl.where(found, logits, 0.0), 1), mask=tl.max(found.to(tl.int32), 1) > 0
        )
    at = tl.program_id(1) * n + rows
    tl.store(highest_ptr + at, highest, mask=row_mask)
    tl.store(total_ptr + at, total, mask=row_mask)


@triton.jit(
    do_not_specialize=["n", "first_word"], do_not_specialize_on_alignment=["targets_ptr", "lse_ptr", "scale_ptr"]
)
def logits_gradient_kernel(
    hidden_ptr, weight_ptr, targets_ptr, lse_ptr, scale_ptr, grad_ptr, n, H, first_word, num_words,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad [n, num_words]: scale · (softmax − indicator of the target) for words first_word and on."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask, word_mask = rows < n, words < num_words
    logits = logits_tile(
        hidden_ptr, weight_ptr, rows, first_word + words, row_mask, word_mask, H, BLOCK_N, BLOCK_V, BLOCK_H, PRECISION
    )
    targets = tl.load(targets_ptr + rows, mask=row_mask, other=-1)
    lse = tl.load(lse_ptr + rows, mask=row_mask, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=row_mask, other=0.0)
    grad = tl.exp(logits - lse[:, None]) - (first_word + words[None, :] == targets[:, None]).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * num_words + words[None, :]
    grad = (scale[:, None] * grad).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + at, grad, mask=row_mask[:, None] & word_mask[None, :])


def linear_cross_entropy_launch(
    hidden, weight, targets, highest, total, target_logit, words_per_split, tile, precision
):
    """Fill highest and total [S, n] and target_logit [n], all float32."""
    num_rows, width = hidden.shape
    grid = (triton.cdiv(num_rows, tile.block_o), highest.shape[0])
    linear_cross_entropy_kernel[grid](
        hidden, weight, targets, highest, total, target_logit, num_rows, width, weight.shape[0], words_per_split,
        BLOCK_N=tile.block_o, BLOCK_V=tile.block_i, BLOCK_H=tile.block_t, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def logits_gradient_launch(hidden, weight, targets, lse, scale, grad, first_word, tile, precision):
    """Fill grad [n, words] for the words from first_word on."""
    (num_rows, width), num_words = hidden.shape, grad.shape[1]
    grid = (triton.cdiv(num_rows, tile.block_o), triton.cdiv(num_words, tile.block_i))
    logits_gradient_kernel[grid](
        hidden, weight, targets, lse, scale, grad, num_rows, width, first_word, num_words,
        BLOCK_N=tile.block_o, BLOCK_V=tile.block_i, BLOCK_H=tile.block_t, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
