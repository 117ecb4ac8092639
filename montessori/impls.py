"""Which implementation of `montessori.ops` computes: by name, or by the device of the tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from montessori import cpu, cuda, gpu
from montessori.errors import ArgumentError, FallbackWarning
from montessori.steps import OptimizerStep

_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "cuda": cuda.unavailable,
    "triton": gpu.unavailable,
    "cpu": cpu.unavailable,
}
# "reference" takes every argument that the checks let through.
_PREFERENCE = ("cuda", "triton", "cpu", "reference")
# What "auto" tries by the tensors' device, where no measurement on it says otherwise.
_AUTO = {"cuda": "triton", "cpu": "cpu"}


def available_impls() -> tuple[str, ...]:
    """Names that `impl=` accepts in this installation, besides "auto"."""
    return tuple(name for name in _PREFERENCE if name not in _UNAVAILABLE or _UNAVAILABLE[name]() is None)


def check_impl(impl: str, argument: str = "impl") -> str:
    """`impl` itself, if it is "auto" or an implementation of this installation.

    Raises ArgumentError with the reason otherwise, under the name of the `argument` that it was given as.
    """
    if impl == "auto" or impl in available_impls():
        return impl
    reason = f": {_UNAVAILABLE[impl]()}" if impl in _UNAVAILABLE else ""
    known = ", ".join(repr(name) for name in available_impls())
    raise ArgumentError(f"{argument}={impl!r}: expected 'auto' or one of {known} in this installation{reason}")


def choose_impl(impl: str, step: OptimizerStep, *tensors: Tensor | None) -> tuple[str, str]:
    """The implementation that scores these tensors, and why.

    "auto" takes kernels made for the tensors' device, else plain torch; which of a GPU's is fastest,
    `montessori.calibration.resolve` has said before. Raises ArgumentError when an implementation asked for by name
    cannot take the arguments.
    """
    check_impl(impl)
    if impl == "reference":
        return impl, "asked for by name"
    name = impl if impl != "auto" else _AUTO.get(_device_type(tensors), "reference")
    if name == "reference":
        return name, f"no kernels for the device {_device_type(tensors)!r}"
    reason = _unsupported(name, step, *tensors)
    if reason is None:
        return name, "asked for by name" if impl == name else f"kernels made for the device {_device_type(tensors)!r}"
    if impl == name:
        raise ArgumentError(f"impl={name!r}: {reason}; pass impl='auto' or 'reference'")
    if name == "cpu" and cpu.missing() is not None and all(t is None or t.dtype in cpu.DTYPES for t in tensors):
        warnings.warn(f"plain torch scores in the place of compiled kernels: {reason}", FallbackWarning, stacklevel=2)
    return "reference", f"not {name!r}, because {reason}"


def _device_type(tensors: tuple[Tensor | None, ...]) -> str:
    return next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")


def _unsupported(name: str, step: OptimizerStep, *tensors: Tensor | None) -> str | None:
    if name == "triton":
        return gpu.unsupported(*tensors)
    return cuda.unsupported(step, *tensors) if name == "cuda" else cpu.unsupported(*tensors)
