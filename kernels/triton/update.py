"""The optimizer's map on a tile: what the step divides by −lr, decoupled weight decay left out (Eq. 1).

With the constants of the step folded (a1, a2 on exp_avg and the gradient, s1, s2 on exp_avg_sq and its square):

    AdamW   (a1 m + a2 g) / (sqrt(s1 v + s2 g²) + ε)          SGD   a1 m + a2 g
"""

import triton
import triton.language as tl


@triton.jit
def step_update(grad, momentum, second, a2, s2, eps, ADAM: tl.constexpr):
    """Update of a tile from its float32 gradient, momentum = a1 m and second = s1 v."""
    update = momentum + a2 * grad
    if ADAM:
        update = update / (tl.sqrt(second + s2 * grad * grad) + eps)
    return update


@triton.jit
def load_state(
    exp_avg_ptr, exp_avg_sq_ptr, at, mask, a1, s1, like, ADAM: tl.constexpr, MOMENT: tl.constexpr, CACHE: tl.constexpr
):
    """momentum = a1 m and second = s1 v in float32 at offsets `at`; zeros of `like` for what the step has not.

    Lanes outside `mask` get v = 1, so that their update is 0 and not 0 / 0 where ε is 0.
    """
    momentum, second = like, like
    if MOMENT:
        momentum = a1 * tl.load(exp_avg_ptr + at, mask=mask, other=0.0, eviction_policy=CACHE).to(tl.float32)
    if ADAM:
        second = s1 * tl.load(exp_avg_sq_ptr + at, mask=mask, other=1.0, eviction_policy=CACHE).to(tl.float32)
    return momentum, second
