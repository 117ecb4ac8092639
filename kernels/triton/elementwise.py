"""Kernels on a parameter of any shape as a flat array: scores of ready gradients, and the step itself."""

import triton
import triton.language as tl

from .update import load_state, step_update


@triton.jit(do_not_specialize=["num_examples", "num_tiles", "examples_per_program"])
def adam_influence_kernel(
    grad_ptr, q_ptr, exp_avg_ptr, exp_avg_sq_ptr, param_ptr, partial_ptr,
    num_examples, size, num_tiles, examples_per_program, a1, a2, s1, s2, eps, decay, l2,
    SETS: tl.constexpr, ADAM: tl.constexpr, MOMENT: tl.constexpr, DECAY: tl.constexpr, L2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [K, B, num_tiles]: Σ over a block of q · (update of grad [B, size] + decay θ)."""
    tile = tl.program_id(0)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    zeros = tl.zeros([BLOCK], tl.float32)
    momentum, second = load_state(exp_avg_ptr, exp_avg_sq_ptr, at, mask, a1, s1, zeros, ADAM, MOMENT, "evict_first")
    param = zeros
    if DECAY or L2:
        param = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
    first = tl.program_id(1) * examples_per_program
    for b in range(first, tl.minimum(first + examples_per_program, num_examples)):
        grad = tl.load(grad_ptr + tl.cast(b, tl.int64) * size + at, mask=mask, other=0.0).to(tl.float32)
        update = step_update(grad + l2 * param, momentum, second, a2, s2, eps, ADAM) + decay * param
        for k in tl.static_range(SETS):
            q = tl.load(q_ptr + tl.cast(k, tl.int64) * size + at, mask=mask, other=0.0).to(tl.float32)
            where = (tl.cast(k, tl.int64) * num_examples + b) * num_tiles + tile
            tl.store(partial_ptr + where, tl.sum(q * update))


def adam_influence_launch(grad, q, exp_avg, exp_avg_sq, param, partial, constants, flags, block, examples_per_program):
    """Fill partial [K, B, tiles] from contiguous grad [B, n] and flat state [n]."""
    num_sets, num_examples, num_tiles = partial.shape
    adam_influence_kernel[(num_tiles, triton.cdiv(num_examples, examples_per_program))](
        grad, q, exp_avg, exp_avg_sq, param, partial, num_examples, grad.shape[1], num_tiles, examples_per_program,
        *constants,
        SETS=num_sets, **flags, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def adam_step_kernel(
    param_ptr, source_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, size, lr, a1, a2, s1, s2, eps, decay, l2,
    ADAM: tl.constexpr, MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """param = source + Δ(grad); the optimizer state is left as it is."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    zeros = tl.zeros([BLOCK], tl.float32)
    momentum, second = load_state(exp_avg_ptr, exp_avg_sq_ptr, at, mask, a1, s1, zeros, ADAM, MOMENT, "evict_last")
    source = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    update = step_update(grad + l2 * source, momentum, second, a2, s2, eps, ADAM) + decay * source
    tl.store(param_ptr + at, (source - lr * update).to(param_ptr.dtype.element_ty), mask=mask)


def adam_step_launch(param, source, grad, exp_avg, exp_avg_sq, lr, constants, flags, block):
    """Write param [n] from source, grad and state [n]; `param` may be `source`."""
    adam_step_kernel[(triton.cdiv(param.numel(), block),)](
        param, source, grad, exp_avg, exp_avg_sq, param.numel(), lr, *constants,
        ADAM=flags["ADAM"], MOMENT=flags["MOMENT"], BLOCK=block, num_warps=4,
    )  # fmt: skip
