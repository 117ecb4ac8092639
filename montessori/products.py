"""Matrix products of plain linear layers through the faster of the two libraries that torch carries.

On a processor torch sends float32 products to MKL, which keeps its best code for its own maker's processors. On others
oneDNN, in the same build of torch, is as fast or faster (docs/performance.md) at the same precision: float32 products,
float32 sums. For attention's many small products MKL is the faster one. A lower `torch.set_float32_matmul_precision`
sends all of them to oneDNN, which without bfloat16 matrix units (AMX) multiplies in float32 all the same; candidates
are then scored as at "highest". Where it does round, on Intel's processors, where `torch.backends.mkldnn` is off, and
for every other dtype and device, torch's own choice stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from montessori.shared import Shared

# Torch has switches there that its annotations lack.
_BACKENDS: Any = torch.backends


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of x [..., I], weight [O, I] and bias [O], as `torch.nn.functional.linear` has it; no autograd."""
    if not _onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    # Not a view: a model may change it in place, which autograd refuses for views that come out of a Function.
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], weight.shape[0]))


def add_product_(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """total += dYᵀ X of total [O, I], dy [n, O] and x [n, I]; no autograd."""
    if _onednn(dy, x, None) and total.dtype == torch.float32:
        total += product(dy.t(), x.t())
    else:
        total.addmm_(dy.t(), x)


def float32_precision() -> str:
    """What `torch.get_float32_matmul_precision` says; where torch's newer switches were set to what it has no word for,
    theirs, such as "tf32".
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return f"{_BACKENDS.cuda.matmul.fp32_precision}, {_BACKENDS.mkldnn.matmul.fp32_precision}"


def gpu_rounds_products() -> bool:
    """Whether float32 products on a GPU are of factors rounded to TF32, by either of torch's switches."""
    return bool(_BACKENDS.cuda.matmul.fp32_precision == "tf32")


@contextmanager
def unrounded_products() -> Iterator[None]:
    """Inside, float32 products are of float32 factors whatever torch's switches say: two ways to compute the same are
    told from a mistake by much less than rounded factors put between them.

    The switches are those of the process: of several threads the last one to leave sets them back.
    """
    with _UNROUNDED.on():
        yield


@contextmanager
def _unrounded() -> Iterator[None]:
    precision = float32_precision()
    with ExitStack() as earlier:
        if precision != "highest":
            for switch in (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul):
                # A switch that inherits its value is set back to inheriting it.
                inherited = switch.fp32_precision == _BACKENDS.fp32_precision
                earlier.callback(setattr, switch, "fp32_precision", "none" if inherited else switch.fp32_precision)
                switch.fp32_precision = "ieee"
            if precision in ("high", "medium"):
                earlier.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        yield


_UNROUNDED = Shared(_unrounded)


def torch_rounds_products() -> bool:
    """Whether torch's float32 products on this processor are of rounded factors, with its switch as it is."""
    above_one = torch.full((64, 64), 1 + 2.0**-12)  # bfloat16 and tf32 have no number between 1 and 1 + 2^-10
    return bool((above_one @ above_one)[0, 0] == 64)


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Inside, plain linear layers call `product`, forward and for the gradient of their input, and torch's switch
    stands at "highest" where a lower one changes the library but not the precision."""
    with ExitStack() as stack:
        on_processor = all(parameter.device.type == "cpu" for parameter in model.parameters())
        if on_processor and not torch_rounds_products():
            stack.enter_context(unrounded_products())
        for module in model.modules():
            if is_plain_linear(module):
                stack.enter_context(forward_replaced(module, partial(_forward, module)))
        yield


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling this module is x Wᵀ + b and nothing else, whoever wrapped or derived from it."""
    return type(module).forward is nn.Linear.forward and "forward" not in vars(module)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, this one module computes `forward`; its hooks still fire."""
    earlier = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        # After an interrupt all may have been put back before this generator is closed.
        if vars(module).get("forward") is forward:
            del module.forward
            if earlier is not None:
                module.forward = earlier  # type: ignore[method-assign]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` with gradients."""
    return _Product.apply(x, weight, bias) if _onednn(x, weight, bias) else F.linear(x, weight, bias)


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


class _Product(torch.autograd.Function):
    """`product` with its gradients by the same library: dX = dY W, and dW = dYᵀ X for trained layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_x = product(upstream[0], weight.t()) if of_x else None
        if not (of_weight or of_bias):
            return grad_x, None, None
        rows = upstream[0].reshape(-1, weight.shape[0])
        grad_weight = product(rows.t(), x.reshape(-1, weight.shape[1]).t()) if of_weight else None
        return grad_x, grad_weight, rows.sum(0) if of_bias else None


@lru_cache(maxsize=1)
def mkl_is_at_home() -> bool:
    """Whether torch has MKL, on a processor of MKL's maker: there it is the faster one.

    By the maker and not by a trial, so that the same command has the same bits every time.
    """
    try:
        made_by_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return made_by_intel and torch.backends.mkl.is_available()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, weight, bias) if tensor is not None)
    return bool(
        plain
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not mkl_is_at_home()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and float32_precision() == "highest"
        and not torch.is_autocast_enabled("cpu")
    )
