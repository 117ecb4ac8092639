"""What the rows that an example touches add to the score of a table (Eq. 6)."""

import triton
import triton.language as tl

from .update import load_state, step_update


@triton.jit(do_not_specialize=["num_segments", "num_tiles", "V"])
def row_changes_kernel(
    order_ptr, starts_ptr, ids_ptr, grad_ptr, base_at_ptr, base_ptr, q_ptr, exp_avg_ptr, exp_avg_sq_ptr, param_ptr,
    partial_ptr,
    num_segments, num_tiles, V, I, a1, a2, s1, s2, eps, decay, l2,
    SETS: tl.constexpr, ADAM: tl.constexpr, MOMENT: tl.constexpr, L2: tl.constexpr, BASE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [K, S, num_tiles]: f(h + g) − f(h) of one touched row and BLOCK of its columns.

    Segment s is one row of one example; its gradient g is the sum of grad[order[starts[s]:starts[s+1]]], and
    h is base[base_at[s]], or 0. Decoupled decay is the same in both and drops out.
    """
    segment, tile = tl.program_id(0), tl.program_id(1)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    mask = columns < I
    grad = tl.zeros([BLOCK], tl.float32)
    for position in range(tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)):
        row = tl.load(order_ptr + position)
        grad += tl.load(grad_ptr + row * I + columns, mask=mask, other=0.0).to(tl.float32)
    zeros = tl.zeros([BLOCK], tl.float32)
    at = tl.load(ids_ptr + segment) * I + columns
    momentum, second = load_state(exp_avg_ptr, exp_avg_sq_ptr, at, mask, a1, s1, zeros, ADAM, MOMENT, "evict_first")
    shift = zeros
    if L2:
        shift += l2 * tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if BASE:
        shift += tl.load(base_ptr + tl.load(base_at_ptr + segment) * I + columns, mask=mask, other=0.0).to(tl.float32)
    moved = step_update(grad + shift, momentum, second, a2, s2, eps, ADAM)
    moved -= step_update(shift, momentum, second, a2, s2, eps, ADAM)
    for k in tl.static_range(SETS):
        q = tl.load(q_ptr + tl.cast(k, tl.int64) * V * I + at, mask=mask, other=0.0).to(tl.float32)
        where = (tl.cast(k, tl.int64) * num_segments + segment) * num_tiles + tile
        tl.store(partial_ptr + where, tl.sum(q * moved))


def row_changes_launch(
    order, starts, ids, grad, base_at, base, q, exp_avg, exp_avg_sq, param, partial, constants, flags, block
):
    """Fill partial [K, S, tiles] for S segments; order, starts [S+1], ids [S] and base_at [S] int64."""
    num_sets, num_segments, num_tiles = partial.shape
    row_changes_kernel[(num_segments, num_tiles)](
        order, starts, ids, grad, base_at, base, q, exp_avg, exp_avg_sq, param, partial, num_segments, num_tiles,
        *param.shape, *constants, SETS=num_sets, ADAM=flags["ADAM"], MOMENT=flags["MOMENT"], L2=flags["L2"],
        BASE=base is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
