"""What `benchmarks.gpu` runs on the device: each section returns a dict for the JSON, with the table under "rows".

Times are medians in milliseconds by device events. Dimensions as in `montessori.ops`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_models
from benchmarks.gpu_checks import check_head, check_small
from montessori import cuda, gpu, reference, tiles, trial
from montessori.calibration import HOPPER_KERNELS
from montessori.spans import Spans
from montessori.trial import HELD, NARROW, STEP, make_problem, milliseconds, timed

# [O, I] of the layers that hold most of the weights.
SHAPES = {
    "TinyLlama q": (2048, 2048),
    "TinyLlama up": (5632, 2048),
    "Llama-3-8B q": (4096, 4096),
    "Llama-3-8B up": (14336, 4096),
}
LENGTHS = (64, 128, 256, 512, 1024, 2048)
PACKED_TOKENS = 16384
# Lengths of real examples: no multiples of a tile, mean 256.
MIXED = (61, 130, 187, 219, 256, 301, 358, 536)
COPIED = 1 << 29  # elements
SQUARE = 8192
ELEMENTS = 1 << 28
TOKENS, FEATURES, WORDS = 4096, 4096, 128256  # of the vocabulary head
MOST_PROCESSES = 8
# Hundreds of launches take the host some 11 ms; this is about 50 on the device.
LONG_WAIT_CYCLES = 100_000_000

Part = Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class Section:
    work: Callable[[], dict[str, Any]]
    limit_s: int
    needs: str | None = None  # the section without which it has no worth


def describe_device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "total_memory", "multi_processor_count", "L2_cache_size", "major", "minor")
    return {name: getattr(properties, name, None) for name in names} | {"cuda": torch.version.cuda}


def ceilings() -> dict[str, Any]:
    """Measured copy bandwidth and matrix product rate, the two limits that times are read against."""
    source = torch.randn(COPIED, device="cuda")
    copied = milliseconds(lambda: source.clone())
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = milliseconds(lambda: a @ b)
    row = {
        "copy TB/s": 2 * source.numel() * 4 / copied / 1e9,
        "bf16 product TFLOP/s": 2 * SQUARE**3 / multiplied / 1e9,
    }
    return {"rows": [row]}


def in_processes(parts: dict[str, Part]) -> list[dict[str, Any]]:
    """Rows of all parts, each worked out in one of several processes: most of their time goes into compiling."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1, len(parts))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        waiting, rows = {name: pool.submit(work) for name, work in parts.items()}, []
        for name, result in waiting.items():
            try:
                rows += result.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"failed: {name}", file=sys.stderr)
                raise
    return rows


def passed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of `trial.check`, if all are as they must be."""
    wrong = trial.failures(rows)
    if wrong:
        raise SystemExit(f"wrong results in {len(wrong)} of {len(rows)} cases, such as {wrong[:2]}")
    return {"rows": rows}


def checks_triton() -> dict[str, Any]:
    """Every Triton kernel against float64."""
    parts: dict[str, Part] = {f"small, {dtype}": partial(check_small, dtype) for dtype in HELD}
    parts |= {f"head, {dtype}": partial(check_head, dtype) for dtype in (*NARROW, torch.float32)}
    for settings in ({}, {"sets": 3}, {"tied": True}):
        for operand in NARROW if settings else (*NARROW, torch.float32):
            for state in HELD:
                check = partial(trial.check, gpu.linear_influence, (operand,), (state,), **settings)
                parts[f"{operand}, {state}, {settings}"] = check
    return passed(in_processes(parts))


def checks_tiles() -> dict[str, Any]:
    """The Triton kernel against float64 by every tile that is timed."""
    parts: dict[str, Part] = {}
    for tile in tiles.RIVALS:
        for state in HELD:
            run = partial(gpu.linear_influence, tile=tile)
            parts[f"{tile}, {state}"] = partial(trial.check, run, NARROW[:1], (state,))
    return passed(in_processes(parts))


def checks_cuda(kernel: str) -> dict[str, Any]:
    """A CUDA kernel of the fused linear influence against float64."""
    _load_cuda()
    run = partial(cuda.linear_influence, kernel=kernel)
    return passed(trial.check(run, NARROW, HELD) + trial.check(run, NARROW, HELD, sets=3))


def _load_cuda() -> None:
    if cuda.load_error() is not None:
        raise SystemExit(cuda.load_error())


def _unfused(adam_dot: Callable[..., Tensor], x: Tensor, dy: Tensor, spans: Spans, *state: Any) -> list[Tensor]:
    return [adam_dot(dy[low:high].T @ x[low:high], *state[:4]) for low, high in spans]


def _adam_dot(grad: Tensor, q: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor) -> Tensor:
    return (q[0] * reference.adamw_delta(grad.float(), exp_avg, exp_avg_sq, param, STEP)).sum()


def linear(
    run: Callable[..., Any],
    states: tuple[torch.dtype, ...] = HELD,
    check: Callable[..., dict[str, Any]] = trial.spot_check,
    **waiting: int,
) -> dict[str, Any]:
    """Time of one way to score a linear layer beside the plain dW product of the same packed tokens, and the error of
    what was timed.

    FLOP: 2 · tokens · O · I. Bytes that must move once: 12 (6 in bfloat16) for m, v, q and 4 for θ per element.
    """
    rows = []
    for name, label, lengths, sets in _linear_cases():
        for state in states:
            shape = SHAPES[name]
            p = make_problem(shape, lengths, state=state, sets=sets)
            error, times = check(run, p), timed(run, p, **waiting)
            rows.append(
                {"shape": name, "T": label, "sets": sets, "state": str(state).removeprefix("torch."), **error, **times,
                 "TFLOP/s": 2 * sum(lengths) * shape[0] * shape[1] / times["ms"] / 1e9}
            )  # fmt: skip
    return passed(rows)


def _linear_cases() -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Shape, label of the lengths, lengths, number of reference sets."""
    for name in SHAPES:
        for length in LENGTHS:
            yield name, str(length), (length,) * (PACKED_TOKENS // length), 1
    name = list(SHAPES)[-1]
    yield name, "mixed", MIXED * max(1, PACKED_TOKENS // sum(MIXED)), 1
    yield name, str(LENGTHS[1]), (LENGTHS[1],) * (PACKED_TOKENS // LENGTHS[1]), 3


def linear_triton() -> dict[str, Any]:
    """Triton's fused linear influence against the plain dW product."""
    return linear(gpu.linear_influence)


def linear_cuda(kernel: str) -> dict[str, Any]:
    """A CUDA kernel of the fused linear influence against the plain dW product."""
    _load_cuda()
    return linear(partial(cuda.linear_influence, kernel=kernel))


def linear_unfused() -> dict[str, Any]:
    """A product per example and a compiled Adam-dot on the stored gradient (of the first set), against plain dW."""
    run = partial(_unfused, torch.compile(_adam_dot, dynamic=False))
    return linear(run, (torch.float32,), lambda run, p: {}, waiting_cycles=LONG_WAIT_CYCLES)


def rival_tiles() -> dict[str, Any]:
    """Tiles of the Triton kernel beside the one chosen."""
    rows = []
    for length in (128, 512, 2048):
        for state in HELD:
            p = make_problem(SHAPES["Llama-3-8B q"], (length,) * (PACKED_TOKENS // length), state=state)
            for tile in tiles.RIVALS:
                time = milliseconds(lambda p=p, tile=tile: gpu.linear_influence(*p.arguments(), tile=tile))
                rows.append({"T": length, "state": str(state), "tile": str(tile), "ms": time})
    return {"rows": rows}


def small() -> dict[str, Any]:
    """Memory-bound kernels: bytes that must move over time, beside the copy of the same run."""
    size = ELEMENTS
    tensors = [torch.randn(size, device="cuda") for _ in range(4)]
    grad, q, exp_avg, param = tensors
    second, source = exp_avg.square() + 0.1, param.clone()
    copy = 2 * 4 * size / milliseconds(lambda: param.copy_(source)) / 1e9
    scored = milliseconds(lambda: gpu.adam_influence(grad[None], q[None], exp_avg, second, param, STEP))
    stepped = milliseconds(lambda: gpu.adam_step_(param, source, grad, exp_avg, second, STEP))
    # Eight examples of a norm, with as many features as fill the memory.
    dy, x = (tensor.bfloat16().view(TOKENS, -1) for tensor in (grad, exp_avg))
    spans = [(low, low + TOKENS // 8) for low in range(0, TOKENS, TOKENS // 8)]
    summed = milliseconds(lambda: gpu.example_sums(dy, spans, x, second[:TOKENS]))
    # Scores read g, q, m, v, θ; the step reads g, m, v, θ and writes θ; sums read dY and X in bfloat16.
    moved = {
        "copy": copy,
        "ready gradients": 20 * size / scored / 1e9,
        "step": 20 * size / stepped / 1e9,
        "sums of norms": 4 * size / summed / 1e9,
    }
    return {"rows": [{"kernel": name, "TB/s": rate, "of copy": rate / copy} for name, rate in moved.items()]}


def head() -> dict[str, Any]:
    """Token losses of a vocabulary head of 128,256 words, with and without its logits in memory, and their error."""
    hidden = torch.randn(TOKENS, FEATURES, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(WORDS, FEATURES, device="cuda", dtype=torch.bfloat16) / 64
    targets = torch.randint(0, WORDS, (TOKENS,), device="cuda")

    def plain() -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

    def fused() -> Tensor:
        return gpu.linear_cross_entropy(hidden, weight, targets)[0]

    few = slice(0, TOKENS, TOKENS // 4)
    want, sizes = _token_losses(hidden[few], weight, targets[few])
    rows = []
    # Plain logits are rounded when they are stored, and a loss is the difference of two.
    for name, work, allowed in (("plain", plain, torch.finfo(hidden.dtype).eps), ("triton", fused, trial.SUMMED)):
        error = float(((work()[few] - want).abs() / sizes).max())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time, peak = milliseconds(work), (torch.cuda.max_memory_allocated() - before) / 1e6
        rows.append({"way": name, "error": error, "right": error <= allowed, "ms": time, "peak MB": peak})
    return passed(rows)


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n] in float64, and the sizes that their errors go by: 1 + the largest logit."""
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits, targets, reduction="none"), 1 + logits.abs().amax(1)


def _named(work: Callable[..., dict[str, Any]], *arguments: str) -> Callable[[], dict[str, Any]]:
    run = partial(work, *arguments)
    run.__doc__ = work.__doc__
    return run


FIRST_SCORED = "score triton"
# The most telling first: time may run out. From FIRST_SCORED on, "auto" knows what the sections before it measured.
SECTIONS = {
    "ceilings": Section(ceilings, 40),
    **{f"checks {name}": Section(_named(checks_cuda, name), 40) for name in HOPPER_KERNELS},
    "checks triton": Section(checks_triton, 90),
    **{f"linear {name}": Section(_named(linear_cuda, name), 40, needs=f"checks {name}") for name in HOPPER_KERNELS},
    "linear triton": Section(linear_triton, 40, needs="checks triton"),
    FIRST_SCORED: Section(_named(gpu_models.score, "triton"), 60, needs="checks triton"),
    "score mixed": Section(_named(gpu_models.score, "auto", "mixed"), 60),
    "score 8B": Section(gpu_models.score_8b, 100),
    "fidelity": Section(gpu_models.fidelity, 60),
    "small": Section(small, 40),
    "linear unfused": Section(linear_unfused, 90),
    "head": Section(head, 40),
    "score cuda": Section(_named(gpu_models.score, "cuda"), 60),
    "checks tiles": Section(checks_tiles, 60),
    "tiles": Section(rival_tiles, 60, needs="checks tiles"),
}
