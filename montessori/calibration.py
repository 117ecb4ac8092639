"""Which kernel of the fused linear influence is fastest on the GPU at hand: measured once, kept, read by "auto".

    montessori calibrate

The first estimator in bfloat16 or float16 on a GPU does the same where it finds nothing kept and has a choice. Every
kernel is first checked against float64, then timed beside the plain dW product, in a process of its own: one that is
wrong, hangs or breaks the device is left out. The choice goes by device and dtype of the state and never by the
examples of a call, so that an example has the same bits alone and in any batch. Without a measurement, "auto" takes
Triton.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from montessori import cuda, gpu
from montessori.errors import ArgumentError, FallbackWarning, ModelError, MontessoriError, ResourceError
from montessori.fingerprint import content_digest, installed
from montessori.models import cache_directory
from montessori.spans import Spans
from montessori.steps import OptimizerStep
from montessori.wording import clipped
from montessori.writing import write_json

LIMIT_S = 180  # of a kernel: compiling, checking, timing
SHAPES = ((2048, 2048), (5632, 2048))
LENGTHS = (128, 512, 2048)
PACKED_TOKENS = 16384
HOPPER_KERNELS = ("wgmma_cluster", "wgmma", "mma")
LOGGER = logging.getLogger("montessori")
_FILE = "kernels.json"


def ranking(q: Tensor, *moments: Tensor | None) -> list[str]:
    """The kernels on the device of q for a state of these dtypes, fastest first; none where nothing was measured with
    the installed versions, or nothing was right."""
    held = {tensor.dtype for tensor in (q, *moments) if tensor is not None}
    return _ranked(q.device).get("bfloat16" if held == {torch.bfloat16} else "float32", [])


def fastest(device: torch.device) -> list[str]:
    """What "auto" takes on this device, "state: kernel" for each dtype of the state; empty off GPUs and before a
    measurement."""
    return [f"{state}: {names[0]}" for state, names in _ranked(device).items()] if device.type == "cuda" else []


def ensure(parameters: Iterable[Tensor]) -> None:
    """Calibrate once where "auto" has a choice for these trained weights: matrices in bfloat16 or float16 on a GPU.

    Processes that come meanwhile wait for the one that measures. MONTESSORI_CALIBRATE=0 leaves it out. What goes wrong
    is told as a FallbackWarning, and "auto" takes Triton.
    """
    if os.environ.get("MONTESSORI_CALIBRATE") == "0":
        return
    for device in {p.device for p in parameters if p.is_cuda and p.dim() == 2 and p.dtype in cuda.OPERANDS}:
        with torch.cuda.device(device):
            _ensure(_name(device))


@lru_cache(maxsize=8)
def _ensure(device: str) -> None:
    if _is_measured(device) or len(kernels()) < 2:
        return
    try:
        with _one_at_a_time():
            _kept.cache_clear()
            if not _is_measured(device):
                most = LIMIT_S * len(kernels()) // 60
                LOGGER.warning("%s: measuring which kernel is fastest here; once, at most %d minutes", device, most)
                calibrate()
    except MontessoriError as error:
        warnings.warn(f"{device}: backend 'auto' takes Triton ({error})", FallbackWarning, stacklevel=2)


def _is_measured(device: str) -> bool:
    try:
        return bool(_kept(device))
    except ArgumentError:
        # A damaged file, which is written anew.
        return False


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    path = _path().with_suffix(".lock")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be locked ({error.strerror or error})") from error
        yield


def resolve(impl: str, step: OptimizerStep, *tensors: Tensor | None) -> str:
    """`impl`, or in the place of "auto" "cuda" where its kernels take these tensors and were measured to be fastest,
    and "reference" where Triton's gave wrong results.

    `tensors`: x, dy, q, exp_avg, exp_avg_sq, param and the gradient of tied rows.
    """
    x, _, q, *moments = tensors[:5]
    # A measurement says nothing of wider operands.
    if impl != "auto" or x is None or q is None or not q.is_cuda or x.dtype not in cuda.OPERANDS:
        return impl
    name, compiled = _name(q.device), cuda.unsupported(step, *tensors) is None
    if compiled and ranking(q, *moments)[:1] not in ([], ["triton"]):
        return "cuda"
    record = _kept(name)
    if "triton" in record.get("failed", {}):
        _warn(f"{name}: backend 'auto' takes plain torch, since Triton's kernel failed when it was measured here "
              f"({record['failed']['triton']}); montessori calibrate tries it again")  # fmt: skip
        return "reference"
    if compiled and not record:
        _warn(f"{name}: backend 'auto' takes Triton; `montessori calibrate`, once and some minutes, finds out whether "
              "the CUDA kernels are faster here")  # fmt: skip
    return impl


def _warn(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=3)


def linear_influence(x: Tensor, dy: Tensor, spans: Spans, q: Tensor, *rest: Any) -> Tensor:
    """`montessori.cuda.linear_influence` by the kernel that was measured fastest, or else the one for the device."""
    compiled = [name for name in ranking(q, *rest[:2]) if name != "triton"]
    return partial(cuda.linear_influence, kernel=compiled[0] if compiled else None)(x, dy, spans, q, *rest)


def calibrate(report: Callable[[str, dict[str, Any]], None] = lambda name, outcome: None) -> dict[str, Any]:
    """Check and time the kernels for the current CUDA device, keep what was fastest, and return the record.

    `report` is called with each kernel's name and outcome. Raises ArgumentError without a CUDA device that a kernel can
    run on, ModelError when no kernel was right, ResourceError where one could not be tried, for want of memory say:
    nothing is kept then.
    """
    if not torch.cuda.is_available():
        raise ArgumentError("calibrate: expected a CUDA device, torch finds none")
    if not kernels():
        raise ArgumentError(f"calibrate: expected a device that a kernel runs on, got Triton's: {_triton_refused()}; "
                            f"CUDA: {cuda.load_error() or 'none for it'}; use backend='reference'")  # fmt: skip
    outcomes = {}
    for name in kernels():
        outcomes[name] = _in_a_process(name)
        report(name, outcomes[name])
    return keep(
        {name: outcome["rows"] for name, outcome in outcomes.items() if "error" not in outcome},
        {name: outcome["error"] for name, outcome in outcomes.items() if "error" in outcome},
    )


def keep(timed: dict[str, list[dict[str, Any]]], failed: dict[str, str]) -> dict[str, Any]:
    """Write what the rows of each kernel, `state` and `ratio` to the plain product, say is fastest on this device.

    `failed`: the errors of the others. Returns the record. Raises ModelError when there are no rows, ResourceError when
    it cannot be written.
    """
    states = sorted({row["state"] for rows in timed.values() for row in rows})
    ratios = {state: {name: _mean_ratio(rows, state) for name, rows in timed.items()} for state in states}
    record = {
        "versions": _versions(),
        "failed": failed,
        "ratios": ratios,
        "ranking": {state: sorted(found, key=found.__getitem__) for state, found in ratios.items()},
    }
    try:
        earlier = _read()
    except ArgumentError as error:
        warnings.warn(f"{error}: written anew", FallbackWarning, stacklevel=2)
        earlier = {}
    write_json(_path(), earlier | {_name(torch.cuda.current_device()): record})
    _kept.cache_clear()
    if not timed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise ModelError(f"calibrate: no kernel gave right results on this device ({reasons}); use another backend")
    return record


def kernels() -> list[str]:
    """Kernels that can run on the current device."""
    portable = ["triton"] if _triton_refused() is None else []
    chosen = None if cuda.load_error() is not None else cuda.KERNELS.get(torch.cuda.get_device_capability())
    compiled = HOPPER_KERNELS if chosen == "wgmma" else () if chosen is None else (chosen,)
    return [*compiled, *portable]


def _triton_refused() -> str | None:
    return gpu.unavailable() or gpu.too_old(torch.device("cuda", torch.cuda.current_device()))


def measure(name: str) -> dict[str, Any]:
    """Times of one kernel in this process, under `rows`, or what was wrong, under `error`."""
    # Torch's own kernels are slow to import, and what only reads the choice does without them.
    from montessori import trial
    from montessori.passes import out_of_memory

    run = gpu.linear_influence if name == "triton" else partial(cuda.linear_influence, kernel=name)
    # What the device refuses before the kernel is tried is nothing of the kernel's.
    torch.cuda.synchronize()
    try:
        wrong = trial.failures(trial.check(run, trial.NARROW, trial.HELD))
        if wrong:
            return {"error": f"wrong results: {wrong[0]}"}
        rows = []
        for shape in SHAPES:
            for length in LENGTHS:
                for state in trial.HELD:
                    p = trial.make_problem(shape, (length,) * (PACKED_TOKENS // length), state=state)
                    label = str(state).removeprefix("torch.")
                    named = {"shape": shape, "T": length, "state": label}
                    rows.append(named | trial.spot_check(run, p) | trial.timed(run, p))
        wrong = trial.failures(rows)
        return {"error": f"wrong results: {wrong[0]}"} if wrong else {"rows": rows}
    except Exception as error:
        if out_of_memory(error):
            raise
        return {"error": f"{type(error).__name__}: {clipped(error)}"}


def _name(device: torch.device | int) -> str:
    return torch.cuda.get_device_properties(device).name


def _in_a_process(name: str) -> dict[str, Any]:
    """Outcome of `measure` in a process of its own, or that it took too long. Raises ResourceError where it says
    nothing about the kernel."""
    command = [sys.executable, "-m", "montessori.calibration", name, str(torch.cuda.current_device())]
    # This package, from wherever it was imported here.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT_S} s"}
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if told:
        # A kernel that broke the device may also break the end of the process.
        return json.loads(told[-1])
    lines = done.stderr.strip().splitlines()
    reason = clipped(lines[-1]) if lines else f"exit status {done.returncode}"
    raise ResourceError(
        f"calibrate: {name} could not be tried ({reason}); nothing is kept; mend that and run montessori calibrate"
    )


def _mean_ratio(rows: Iterable[dict[str, Any]], state: str) -> float:
    ratios = [math.log(row["ratio"]) for row in rows if row["state"] == state]
    return math.exp(sum(ratios) / len(ratios)) if ratios else math.inf


def _ranked(device: torch.device) -> dict[str, list[str]]:
    return _kept(_name(device)).get("ranking", {})


@lru_cache(maxsize=8)
def _kept(device: str) -> dict[str, Any]:
    """The record of a measurement with the installed versions; empty where there is none."""
    record = _read().get(device, {})
    return record if record.get("versions") == _versions() else {}


def _versions() -> dict[str, str]:
    """What a measurement goes out of date with."""
    library = content_digest(cuda.LIBRARY) if cuda.LIBRARY.exists() else "none"
    # The metadata of some builds of torch leave out for which CUDA they are.
    return {"library": library, "torch": torch.__version__, **installed("montessori", "triton")}


def _path() -> Path:
    return cache_directory() / _FILE


def _read() -> dict[str, Any]:
    try:
        records = json.loads(_path().read_text(encoding="utf-8"))
        if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
            raise ValueError("not a record for each device")
        return records
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{_path()}: cannot be read ({error}); remove it, and run montessori calibrate") from error


if __name__ == "__main__":
    torch.cuda.set_device(int(sys.argv[2]))
    print(json.dumps(measure(sys.argv[1])))
