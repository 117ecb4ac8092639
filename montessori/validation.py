"""Checks at the boundary of `montessori.ops`: each failure prints what was expected and what came."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from montessori.errors import ArgumentError
from montessori.spans import Spans, spans_of
from montessori.steps import AdamWStep, OptimizerStep, SGDStep

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Every given tensor is a dense floating point tensor on `device`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ArgumentError(f"{name}: expected dtype float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise ArgumentError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
        if tensor.device != device:
            raise ArgumentError(f"{name}: expected device {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], legend: str) -> None:
    """`expected` holds None where any size will do; `legend` names the dimensions."""
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name}: expected a torch.Tensor {legend}, got {type(tensor).__name__}")
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        shown = ", ".join("any" if size is None else str(size) for size in expected)
        raise ArgumentError(f"{name}: expected shape {legend} = [{shown}], got {list(tensor.shape)}")


def check_offsets(offsets: Tensor, num_rows: int | None, name: str = "offsets") -> list[int]:
    """The offsets as a list: sorted, from 0 to `num_rows` (None: to any number), one more than there are examples."""
    if not isinstance(offsets, Tensor) or offsets.dtype is not torch.int64 or offsets.dim() != 1:
        got = f"{offsets.dtype} {list(offsets.shape)}" if isinstance(offsets, Tensor) else type(offsets).__name__
        raise ArgumentError(f"{name}: expected an int64 tensor [B+1], got {got}")
    bounds = offsets.tolist()
    end = num_rows if num_rows is not None else bounds[-1] if bounds else 0
    if not bounds or bounds[0] != 0 or bounds[-1] != end:
        ends = f"{bounds[0]} to {bounds[-1]}" if bounds else "no entry"
        raise ArgumentError(f"{name}: expected to run from 0 to {end} (the rows given), got {ends}")
    for position, (low, high) in enumerate(itertools.pairwise(bounds)):
        if high < low:
            raise ArgumentError(f"{name}: expected sorted offsets, got {low} then {high} at example {position}")
    return bounds


def check_spans(offsets: Tensor, starts: Tensor | None, num_rows: int) -> Spans:
    """The rows of each example: all `num_rows` one after the other, or from its start on and within them."""
    size = len(check_offsets(offsets, num_rows if starts is None else None)) - 1
    if starts is None:
        return spans_of(offsets)
    if not isinstance(starts, Tensor) or starts.dtype is not torch.int64 or starts.shape != (size,):
        got = f"{starts.dtype} {list(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
        raise ArgumentError(f"starts: expected an int64 tensor [B] = [{size}], got {got}")
    spans = spans_of(offsets, starts)
    for example, (low, high) in enumerate(spans):
        if low < 0 or high > num_rows:
            raise ArgumentError(
                f"starts: expected example {example} within the {num_rows} rows given, got rows {low} to {high}"
            )
    return spans


def check_ids(ids: Tensor, num_embeddings: int, device: torch.device, name: str = "ids") -> None:
    """Token ids are int64 [T] on `device` and within the table."""
    if not isinstance(ids, Tensor) or ids.dtype is not torch.int64 or ids.dim() != 1:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(f"{name}: expected an int64 tensor [T], got {got}")
    if ids.device != device:
        raise ArgumentError(f"{name}: expected device {device}, got {ids.device}")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < num_embeddings):
        raise ArgumentError(f"{name}: expected ids in 0..{num_embeddings - 1}, got {int(ids.min())}..{int(ids.max())}")


def check_state(
    q: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    param: Tensor,
    step: OptimizerStep,
) -> None:
    """q [K, *shape] and the optimizer state belong to `param`, and `step` has what it needs."""
    if not isinstance(param, Tensor):
        raise ArgumentError(f"param: expected a torch.Tensor, got {type(param).__name__}")
    tensors = {"q": q, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "param": param}
    check_tensors(tensors, param.device)
    shape = tuple(param.shape)
    check_shape("q", q, (None, *shape), "[K, *param.shape]")
    if isinstance(step, AdamWStep):
        needed: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    elif isinstance(step, SGDStep):
        needed = ("exp_avg",) if step.momentum and step.step > 1 else ()
    else:
        raise ArgumentError(f"step: expected AdamWStep or SGDStep, got {type(step).__name__}")
    for name in needed:
        if tensors[name] is None:
            raise ArgumentError(f"{name}: expected a tensor for {step}, got None")
    for name in ("exp_avg", "exp_avg_sq"):
        tensor = tensors[name]
        if tensor is not None:
            check_shape(name, tensor, shape, "param.shape")
