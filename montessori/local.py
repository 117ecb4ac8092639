"""Per-example gradients of small modules (norms, scales) by running them again on their input rows.

Exact for any module that treats rows alike, whatever its formula and inner precision. Dimensions: B examples,
n rows of all examples together, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from montessori import ops
from montessori.rowmap import Rows, UnmappableRowsError
from montessori.spans import spans_of

if TYPE_CHECKING:
    from montessori.rules import ModuleRule

# By module: the ε that it declares, and the one it was found to compute with, None where it is no RMS norm.
_RMS_EPS: WeakKeyDictionary[nn.Module, tuple[float | None, float | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _RowGradients:
    """Gradients of one parameter by row, [n, *shape]: values · times · scale, `scale` [n]; each may be missing."""

    values: Tensor
    times: Tensor | None = None
    scale: Tensor | None = None


def local_gradients(rule: ModuleRule, module: nn.Module, x: Tensor, dy: Rows, impl: str) -> list[Tensor]:
    """Gradients [B, *shape] of each parameter of `rule`, from x [n, F] and the rows of dy; grad mode must be on.

    All rows at once where the module multiplies or adds its parameters row by row, which it shows by taking
    them with one row per row of x; example by example otherwise. `impl` as in `montessori.ops`.
    """
    own = {key: getattr(module, key).detach() for key in rule.parameters}
    by_row = _norm_rows(module, rule, x, dy.values)
    if by_row is None:
        by_row = _rowwise_gradients(module, own, x, dy.values)
    if by_row is not None:
        return [
            ops.example_sums(grad.values, dy.offsets, starts=dy.starts, times=grad.times, scale=grad.scale, impl=impl)
            for grad in by_row
        ]
    leaves = {key: value.requires_grad_() for key, value in own.items()}
    spans = spans_of(dy.offsets, dy.starts)
    grads = [_replayed(rule, module, leaves, x[low:high], dy.values[low:high]) for low, high in spans]
    return [torch.stack(per_example) for per_example in zip(*grads, strict=True)]


def _norm_rows(module: nn.Module, rule: ModuleRule, x: Tensor, dy: Tensor) -> list[_RowGradients] | None:
    """Row gradients of norms: dY · x̂ of a weight, dY of a bias. None for other modules."""
    if type(module) is nn.LayerNorm:
        normed = F.layer_norm(x, module.normalized_shape, None, None, module.eps).detach()
        return [_RowGradients(dy, normed if key == "weight" else None) for key in rule.parameters]
    if type(module) is nn.RMSNorm:
        return [_RowGradients(dy, F.rms_norm(x, module.normalized_shape, None, module.eps).detach())]
    eps = _rms_eps(module, rule, x)
    if eps is None:
        return None
    squares = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).square()
    return [_RowGradients(dy, x, torch.rsqrt(squares / x.shape[-1] + eps))]


def _rms_eps(module: nn.Module, rule: ModuleRule, x: Tensor) -> float | None:
    """ε of a module whose weight multiplies x / sqrt(mean(x²) + ε), also as 1 + weight; None of any other.

    Known by what it computes, whatever its class. In float64, the precision of checks, a module's own inner precision
    counts, so there it is always run itself.
    """
    if x.dtype is torch.float64 or set(rule.parameters) != {"weight"}:
        return None
    declared = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if _RMS_EPS.get(module, (None, None))[0] != declared:
        _RMS_EPS[module] = declared, _probed_rms_eps(module, declared, x)
    return _RMS_EPS.get(module, (None, None))[1]


def _probed_rms_eps(module: nn.Module, eps: float | None, x: Tensor) -> float | None:
    """`eps` if, in float32, the module's weight has the gradient of an RMS norm's on rows of very different size."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != x.shape[-1:] or not isinstance(eps, float):
        return None
    wave = torch.arange(3 * x.shape[-1], device=x.device).sin().reshape(3, -1)
    rows = torch.tensor([[max(eps, 1e-12) ** 0.5], [1.0], [30.0]], device=x.device) * wave
    found = _rowwise_gradients(module, {"weight": weight.detach().float()}, rows, torch.ones_like(rows))
    if found is None:
        return None
    want = F.rms_norm(rows, weight.shape, None, eps)
    # Some ten roundings on the way to a normed row.
    close = (found[0].values - want).abs() <= 16 * torch.finfo(torch.float32).eps * want.abs()
    return eps if bool(close.all()) else None


def _rowwise_gradients(module: nn.Module, own: dict[str, Tensor], x: Tensor, dy: Tensor) -> list[_RowGradients] | None:
    leaves = {key: value.expand(x.shape[0], *value.shape).clone().requires_grad_() for key, value in own.items()}
    try:
        y = functional_call(module, leaves, (x,))
        if y.shape != dy.shape:
            return None
        grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):
        # The module wants its parameters in their own shape: it is run example by example.
        return None
    return [_RowGradients(grad) for grad in grads]


def _replayed(
    rule: ModuleRule, module: nn.Module, leaves: dict[str, Tensor], x: Tensor, dy: Tensor
) -> Sequence[Tensor]:
    try:
        y = functional_call(module, leaves, (x,))
        return torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        # A module that wants its rows in another arrangement; the check before use sends it to autograd.
        raise UnmappableRowsError(rule.module_name, tuple(x.shape), 1) from error
