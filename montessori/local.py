"""Per-example gradients of small modules (norms, scales) by running them again on their input rows.

Exact for any module that treats rows alike, whatever its formula and inner precision. Dimensions: B examples,
n rows of all examples together, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from montessori.rowmap import UnmappableRowsError

if TYPE_CHECKING:
    from montessori.rules import ModuleRule


def local_gradients(rule: ModuleRule, module: nn.Module, x: Tensor, dy: Tensor, offsets: Tensor) -> list[Tensor]:
    """Gradients [B, *shape] of each parameter of `rule`, from x and dy [n, F]; grad mode must be on.

    All rows at once where the module multiplies or adds its parameters row by row, which it shows by taking
    them with one row per row of x; example by example otherwise.
    """
    own = {key: getattr(module, key).detach() for key in rule.parameters}
    per_row = _norm_rows(module, rule, x, dy)
    if per_row is None:
        per_row = _rowwise_gradients(module, own, x, dy)
    if per_row is not None:
        return [sum_per_example(grad, offsets) for grad in per_row]
    leaves = {key: value.requires_grad_() for key, value in own.items()}
    grads = [_replayed(rule, module, leaves, x[low:high], dy[low:high]) for low, high in pairwise(offsets.tolist())]
    return [torch.stack(per_example) for per_example in zip(*grads, strict=True)]


def sum_per_example(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sums [B, F] of the rows [n, F] of each example, in float32 or wider."""
    wide = rows if rows.dtype is torch.float64 else rows.float()
    return torch.stack([part.sum(0) for part in wide.split(offsets.diff().tolist())])


def _norm_rows(module: nn.Module, rule: ModuleRule, x: Tensor, dy: Tensor) -> list[Tensor] | None:
    """Row gradients of torch's own norms, which take no weight per row: dY · x̂ and dY."""
    if type(module) is nn.LayerNorm:
        normed = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    elif type(module) is nn.RMSNorm:
        normed = F.rms_norm(x, module.normalized_shape, None, module.eps)
    else:
        return None
    return [dy * normed.detach() if key == "weight" else dy for key in rule.parameters]


def _rowwise_gradients(module: nn.Module, own: dict[str, Tensor], x: Tensor, dy: Tensor) -> list[Tensor] | None:
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
    return list(grads)


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
