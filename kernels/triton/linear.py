"""Fused per-example gradient of a linear layer, optimizer step and product with q (Eq. 5).

A program owns one (O, I) tile and loops over examples: it forms the tile of dYᵀX in registers, maps it and
multiplies with q. The gradient never reaches memory. Where HOLD is set, exp_avg and exp_avg_sq stay in registers
over all examples, and q does if there is one; else they are read again per example, from the cache if they fit.
"""

import triton
import triton.language as tl

from .update import load_state, step_update


@triton.jit
def tile_position(tiles_o, tiles_i, GROUP: tl.constexpr):
    """Tiles that run at one time form a near-square patch, so that they share operands in the L2 cache."""
    tile = tl.program_id(0)
    in_group = GROUP * tiles_i
    first_o = tile // in_group * GROUP
    height = tl.minimum(tiles_o - first_o, GROUP)
    return tile, first_o + tile % in_group % height, tile % in_group // height


@triton.jit
def add_rows(
    grad, row_ids_ptr, row_grad_ptr, low, high, first_o, columns, I, in_mask,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add the sparse rows low..high-1, whose ids lie in the tile, as a product with their indicator."""
    for start in range(low, high, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        given = row < high
        target = tl.load(row_ids_ptr + row, mask=given, other=-1) - first_o
        at = row.to(tl.int64)[:, None] * I + columns[None, :]
        rows = tl.load(row_grad_ptr + at, mask=given[:, None] & in_mask[None, :], other=0.0).to(tl.float32)
        indicator = (tl.arange(0, BLOCK_O)[:, None] == target[None, :]).to(tl.float32)
        grad = tl.dot(indicator, rows, grad, input_precision="ieee")
    return grad


@triton.jit
def example_gradient(
    x_ptr, dy_ptr, spans_ptr, b, outs, columns, out_mask, in_mask, grad, O, I,
    BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad + dYᵀX of example b in the tile, in float32."""
    start = tl.load(spans_ptr + 2 * b)
    length = (tl.load(spans_ptr + 2 * b + 1) - start).to(tl.int32)
    token = tl.arange(0, BLOCK_T)
    dy_ptrs = dy_ptr + start * O + token[None, :] * O + outs[:, None]
    x_ptrs = x_ptr + start * I + token[:, None] * I + columns[None, :]
    for done in range(0, length, BLOCK_T):
        given = token < length - done
        # As [O, T]: what is transposed after the load goes through registers, and is not copied ahead.
        dy = tl.load(dy_ptrs, mask=given[None, :] & out_mask[:, None], other=0.0)
        x = tl.load(x_ptrs, mask=given[:, None] & in_mask[None, :], other=0.0)
        grad = tl.dot(dy, x, grad, input_precision=PRECISION)
        dy_ptrs += BLOCK_T * O
        x_ptrs += BLOCK_T * I
    return grad


# Whole numbers that lay out no rows of memory: a variant for each of their kinds would only take time to compile.
@triton.jit(do_not_specialize=["num_examples", "num_tiles", "examples_per_program"])
def linear_influence_kernel(
    x_ptr, dy_ptr, spans_ptr, q_ptr, exp_avg_ptr, exp_avg_sq_ptr, param_ptr,
    row_ids_ptr, row_grad_ptr, row_bounds_ptr, partial_ptr,
    num_examples, O, I, num_tiles, examples_per_program, a1, a2, s1, s2, eps, decay, l2,
    SETS: tl.constexpr, SETS_PADDED: tl.constexpr, ADAM: tl.constexpr, MOMENT: tl.constexpr, DECAY: tl.constexpr,
    L2: tl.constexpr, TIED: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partial [K, B, num_tiles] float32: Σ over the tile of q · (update + decay θ)."""
    tiles_o, tiles_i = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    tile, tile_o, tile_i = tile_position(tiles_o, tiles_i, GROUP)
    first_o = tile_o * BLOCK_O
    outs, columns = first_o + tl.arange(0, BLOCK_O), tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    out_mask, in_mask = outs < O, columns < I
    mask = out_mask[:, None] & in_mask[None, :]
    at = outs.to(tl.int64)[:, None] * I + columns[None, :]
    zeros = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    size = tl.cast(O, tl.int64) * I
    sets = tl.arange(0, SETS_PADDED)
    constants = tl.zeros([SETS_PADDED], tl.float32)
    if DECAY:
        decayed = decay * tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
        for k in range(SETS):
            q = tl.load(q_ptr + k * size + at, mask=mask, other=0.0).to(tl.float32)
            constants = tl.where(sets == k, tl.sum(q * decayed), constants)
    if HOLD:
        momentum, second = load_state(exp_avg_ptr, exp_avg_sq_ptr, at, mask, a1, s1, zeros, ADAM, MOMENT, "evict_first")
        if SETS == 1:
            held_q = tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32)

    first = tl.program_id(1) * examples_per_program
    for b in range(first, tl.minimum(first + examples_per_program, num_examples)):
        grad = zeros
        if L2:
            grad = l2 * tl.load(param_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        grad = example_gradient(
            x_ptr, dy_ptr, spans_ptr, b, outs, columns, out_mask, in_mask, grad, O, I, BLOCK_T, PRECISION
        )
        if TIED:
            bounds = row_bounds_ptr + b * (tiles_o + 1) + tile_o
            low, high = tl.load(bounds), tl.load(bounds + 1)
            grad = add_rows(grad, row_ids_ptr, row_grad_ptr, low, high, first_o, columns, I, in_mask, BLOCK_O, BLOCK_R)
        if not HOLD:
            momentum, second = load_state(
                exp_avg_ptr, exp_avg_sq_ptr, at, mask, a1, s1, zeros, ADAM, MOMENT, "evict_last"
            )
        update = step_update(grad, momentum, second, a2, s2, eps, ADAM)
        for k in range(SETS):
            if HOLD and SETS == 1:
                q = held_q
            else:
                q = tl.load(q_ptr + k * size + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            constant = tl.sum(tl.where(sets == k, constants, 0.0))
            where = (tl.cast(k, tl.int64) * num_examples + b) * num_tiles + tile
            tl.store(partial_ptr + where, tl.sum(q * update) + constant)


def linear_influence_launch(
    x, dy, spans, q, exp_avg, exp_avg_sq, param, rows, partial,
    constants, flags, tile, examples_per_program, precision,
):  # fmt: skip
    """Fill partial [K, B, tiles]; example b has the rows spans[b, 0] to spans[b, 1] of x and dy, spans int64 [B, 2].

    `rows`: sorted ids, gradients and bounds [B, tiles_o + 1] int32, or three None.
    """
    (num_out, num_in), (num_sets, num_examples, num_tiles) = param.shape, partial.shape
    grid = (num_tiles, triton.cdiv(num_examples, examples_per_program))
    linear_influence_kernel[grid](
        x, dy, spans, q, exp_avg, exp_avg_sq, param, *rows, partial,
        num_examples, num_out, num_in, num_tiles, examples_per_program, *constants,
        SETS=num_sets, SETS_PADDED=triton.next_power_of_2(num_sets), **flags, TIED=rows[0] is not None,
        HOLD=tile.hold, PRECISION=precision,
        BLOCK_O=tile.block_o, BLOCK_I=tile.block_i, BLOCK_T=tile.block_t, BLOCK_R=16, GROUP=8,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
