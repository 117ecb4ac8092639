"""The compiled CUDA kernels behind `montessori.ops`, impl="cuda". Dimensions as there.

Arguments are trusted here; `montessori.ops` has checked them.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from montessori import tiles
from montessori.spans import Spans, spans_on
from montessori.steps import AdamWStep, OptimizerStep

if TYPE_CHECKING:
    from montessori.ops import SparseRows

LIBRARY = Path(__file__).with_name("_cuda.so")
OPERANDS = (torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 8  # elements: rows of 16 bytes for the asynchronous copies
# Kernel by capability; others have too little shared memory per block, or machine code is not built for them.
KERNELS = {(8, 0): "mma", (9, 0): "wgmma", (10, 0): "mma"}


def load_error() -> str | None:
    """Why the library cannot be used in this process, None when it is loaded. No driver is needed."""
    return "MONTESSORI_NO_KERNELS is set" if os.environ.get("MONTESSORI_NO_KERNELS") else _loading_error()


@lru_cache(maxsize=1)
def _loading_error() -> str | None:
    if not LIBRARY.exists():
        return "the CUDA kernels were not built (install from source with nvcc and --no-build-isolation)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    return None


@lru_cache(maxsize=1)
def built_archs() -> tuple[str, ...]:
    """Capabilities that the library has machine code for, such as ("80", "90a"). The library has been loaded."""
    return tuple((_told("montessori_cuda_archs") or "").split(","))


@lru_cache(maxsize=1)
def driver_refusal() -> str | None:
    """Why the driver does not run this library, such as that it is too old for the CUDA it was built with; None when
    it does. The library has been loaded."""
    return _told("montessori_cuda_refusal")


def _told(function: str) -> str | None:
    ask = getattr(ctypes.CDLL(str(LIBRARY)), function)
    ask.restype = ctypes.c_char_p
    text = ask()
    return None if text is None else text.decode()


def unavailable() -> str | None:
    """Why the CUDA kernels cannot be used in this process, None when they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return load_error() or driver_refusal()


def unsupported(step: OptimizerStep, *tensors: Tensor | None) -> str | None:
    """Why these arguments are not for the CUDA kernels, None when they are.

    `tensors`: x, dy, q, exp_avg, exp_avg_sq, param, and the gradient of tied rows if there is one.
    """
    x, dy, q, exp_avg, exp_avg_sq, param, *tied = tensors
    if x is None or dy is None or q is None or param is None:
        raise TypeError("expected x, dy, q and param, got None")
    reason = unavailable() or _elsewhere(param)
    if reason is not None:
        return reason
    if not isinstance(step, AdamWStep) or exp_avg is None or exp_avg_sq is None:
        return "it has no SGD"
    if not step.decoupled and step.weight_decay:
        return "it has no Adam with L2 weight decay"
    if not (step.beta1 > 0 and step.beta2 > 0):
        return "it has no Adam with a beta of 0"
    if any(row_grad is not None for row_grad in tied):
        return "it has no weights tied to an embedding"
    return _unsupported_tensors((x, dy), (q, exp_avg, exp_avg_sq, param))


def _elsewhere(param: Tensor) -> str | None:
    if not param.is_cuda:
        return f"it runs on a GPU, got a tensor on {param.device}"
    capability = tiles.capability(param.device)
    if capability not in KERNELS:
        return f"it has no kernel for compute capability {capability[0]}.{capability[1]}"
    arch = f"{capability[0]}{capability[1]}" + ("a" if KERNELS[capability] == "wgmma" else "")
    if arch not in built_archs():
        return f"this build has machine code for {', '.join(built_archs())}, not for {arch}"
    return None


def _unsupported_tensors(operands: tuple[Tensor, Tensor], state: tuple[Tensor, ...]) -> str | None:
    x, dy = operands
    if x.dtype not in OPERANDS or dy.dtype is not x.dtype:
        return f"it takes x and dy in bfloat16 or both in float16, got {x.dtype} and {dy.dtype}"
    if any(tensor.dtype not in STATES for tensor in state):
        return f"it takes state in float32, bfloat16 or float16, got {[tensor.dtype for tensor in state]}"
    if x.shape[0] == 0 or state[0].numel() == 0:
        return "there is no token or no element"
    if state[-1].shape[0] % ALIGNMENT or state[-1].shape[1] % ALIGNMENT:
        return f"it takes sizes divisible by {ALIGNMENT}, got {list(state[-1].shape)}"
    if any(tensor.data_ptr() % 16 for tensor in (*operands, *state)):
        return "a tensor does not start at a multiple of 16 bytes"
    return None


def linear_influence(
    x: Tensor,
    dy: Tensor,
    spans: Spans,
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
    rows: SparseRows | None,
    kernel: str | None = None,
) -> Tensor:
    """Eq. 5 tile by tile; see `montessori.ops.linear_influence`.

    `kernel` is "mma", "wgmma" or "wgmma_cluster", by default the one for the device.
    """
    if not isinstance(step, AdamWStep) or exp_avg is None or exp_avg_sq is None or rows is not None:
        raise TypeError("expected arguments that `unsupported` has let through")
    if not spans:
        return q.new_zeros(0, q.shape[0], dtype=torch.float64)
    contiguous = [tensor.contiguous() for tensor in (q, exp_avg, exp_avg_sq, param)]
    return torch.ops.montessori_cuda.linear_scores(
        x.contiguous(), dy.contiguous(), spans_on(tuple(spans), x.device), *contiguous, *step.folded,
        step.weight_decay, step.lr, kernel or KERNELS[tiles.capability(x.device)],
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
