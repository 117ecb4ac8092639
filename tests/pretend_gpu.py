"""A GPU that is not there: tensors that say they lie on "cuda", hold their values on the CPU and compute there.

For tests of everything around the kernels. What a real GPU refuses is refused here: operands on two devices, and host
tensors given to a kernel. Triton compiles its kernels as for a GPU, and they run as PTX (tests/ptx_machine); the
operator of the CUDA library is written anew in torch. `PretendGpu.waits` counts what would make the host wait for the
device, by place. Nothing here tells of speed or of streams.

A tensor is a wrapper on torch's "meta" device, as torch's own fake tensors are: autograd then asks for no driver. So
there is no "meta" device beside it, and what builds models there, as `from_pretrained` does, comes before.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from ptx_machine.triton_driver import ptx_driver
from torch import Tensor, nn
from torch.__future__ import get_overwrite_module_params_on_conversion, set_overwrite_module_params_on_conversion
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from montessori import cuda

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
MATHEMATICAL_ATTENTION = 0
# The host reads a value or a size that the device computes.
WAITING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
}
# These take indices from the host too.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
CAPABILITY = (9, 0)
KERNEL_MODULES = ("linear", "elementwise", "embedding", "cross_entropy", "partials", "rows")


class OnDevice(Tensor):
    """A tensor on the pretended device; `inner` has the values."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        # A wrapper of inference mode has no version, which older torch wants to set.
        with torch.inference_mode(False):
            self = Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device="meta",
            )  # fmt: skip
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGpu.now.dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"OnDevice({self.inner!r})"

    # What torch does in C++ for these reads the storage.
    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(torch.tensor(part, device=DEVICE) if isinstance(part, list) else part for part in parts)
        return super().__getitem__(parts if isinstance(index, tuple) else parts[0])

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copy = OnDevice(self.inner.clone())
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> list:
        PretendGpu.now.wait()
        return self.inner.tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE)


def values(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


def mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Arguments or results of an operation with their tensors changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        parts = [mapped(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return {name: mapped(change, part) for name, part in tree.items()} if isinstance(tree, dict) else tree


def tensors_in(*trees: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, trees)
    return found


class PretendGpu(TorchDispatchMode):
    """Runs every operation of torch on the values, after the checks of a real device."""

    now: PretendGpu

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def wait(self) -> None:
        """Count that the host waits for the device, by the line of the package (or the model) that makes it."""
        for frame, line in traceback.walk_stack(None):
            name = frame.f_code.co_filename
            if ("/montessori/" in name or "transformers" in name) and "/tests/" not in name:
                self.waits[f"{name.split('/')[-1]}:{line}"] += 1
                return
        self.waits["elsewhere"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.is_inference_mode_enabled():
            # There, operations that are made of others come whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        device = kwargs.get("device")
        onto = None if device is None else torch.device(device).type in ("cuda", "meta")
        if func is aten._to_copy.default:
            return self._copy_to(args[0], onto, kwargs)
        if func is aten.copy_.default:
            return self._copy_into(*args[:2])
        given = tensors_in(args, kwargs)
        here = [tensor for tensor in given if isinstance(tensor, OnDevice)]
        if not here and not onto:
            return func(*args, **kwargs)
        self._check(func, args, given)
        if func is aten._fused_sdp_choice.default:
            return MATHEMATICAL_ATTENTION
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        result = func(*mapped(values, args), **mapped(values, kwargs))
        known = {id(values(tensor)): tensor for tensor in here}
        return mapped(lambda new: known[id(new)] if id(new) in known else OnDevice(new), result)

    def _copy_to(self, source: Tensor, onto: bool | None, kwargs: dict[str, Any]) -> Tensor:
        from_here = isinstance(source, OnDevice)
        onto = from_here if onto is None else onto
        if onto != from_here:
            self.wait()
        copy = aten._to_copy.default(
            values(source), **{name: value for name, value in kwargs.items() if name != "device"}
        )
        return OnDevice(copy) if onto else copy

    def _copy_into(self, target: Tensor, source: Tensor) -> Tensor:
        if isinstance(target, OnDevice) != isinstance(source, OnDevice):
            self.wait()
        values(target).copy_(values(source))
        return target

    def _check(self, func: Callable, args: tuple, given: list[Tensor]) -> None:
        elsewhere = [tensor for tensor in given if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
        indices = [index for index in args[1] if index is not None] if func in INDEXING else []
        if indices and isinstance(args[0], OnDevice):
            elsewhere = [tensor for tensor in elsewhere if not any(tensor is index for index in indices)]
        if elsewhere:
            shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in given]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {shapes}")
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        from_host = any(not isinstance(index, OnDevice) for index in indices)
        if func in WAITING or by_mask or from_host:
            self.wait()

    def launch(self, kernel: Callable, name: str) -> Callable:
        """`kernel`, a host function of montessori.kernels.triton, on the values of tensors that lie here."""

        def run(*args: Any, **kwargs: Any) -> None:
            given = tensors_in(args, kwargs)
            if not all(isinstance(tensor, OnDevice) for tensor in given):
                raise RuntimeError(f"{name}: a kernel was given a tensor of the host")
            with _disable_current_modes():
                kernel(*mapped(values, args), **mapped(values, kwargs))

        return run


def cuda_linear_scores(schema: torch.FunctionSchema, *args: Any) -> Tensor:
    """What the CUDA library's operator computes, from arguments in the order of its schema."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=True))
    tensors = {name: given[name] for name in ("x", "dy", "spans", "q", "exp_avg", "exp_avg_sq", "param")}
    if not all(isinstance(tensor, OnDevice) and tensor.is_contiguous() for tensor in tensors.values()):
        raise RuntimeError("linear_scores: expected contiguous tensors of the device")
    if given["kernel"] not in ("mma", "wgmma", "wgmma_cluster") or given["spans"].dtype is not torch.int64:
        raise RuntimeError(f"linear_scores: unknown kernel or spans, {given['kernel']}, {given['spans'].dtype}")
    with _disable_current_modes():
        x, dy, spans, q, exp_avg, exp_avg_sq, param = (values(tensor).double() for tensor in tensors.values())
        scores = []
        for low, high in spans.long().tolist():
            grad = dy[low:high].T @ x[low:high]
            root = (given["s1"] * exp_avg_sq + given["s2"] * grad.square()).sqrt() + given["eps"]
            update = (given["a1"] * exp_avg + given["a2"] * grad) / root + given["decay"] * param
            scores.append((q * update).sum((1, 2)) * -given["lr"])
        return OnDevice(torch.stack(scores))


class Event:
    """Stands in for torch.cuda.Event."""

    ticks = itertools.count(1)

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None:
        self.tick = next(self.ticks)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return float(end.tick - self.tick)


class Generator(torch.Generator):
    """Random numbers of the CPU for any device."""

    def __new__(cls, device: object = "cpu") -> Generator:
        return super().__new__(cls)


PROPERTIES = SimpleNamespace(
    name="a pretended GPU", total_memory=80 << 30, multi_processor_count=1, L2_cache_size=50 << 20, major=9, minor=0
)
CUDA = {
    "Event": Event,
    "_sleep": lambda cycles: None,
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
    "device": lambda device: contextlib.nullcontext(),
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "max_memory_allocated": lambda: 0,
    "memory_allocated": lambda: 0,
    "reset_peak_memory_stats": lambda: None,
    "synchronize": lambda: None,
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendGpu]:
    """Within, "cuda" is a device and Triton's kernels take its tensors."""
    gpu, tensor = PretendGpu(), torch.tensor

    def make_tensor(data, *, dtype=None, device=None, requires_grad=False):
        made = tensor(data, dtype=dtype, device="cpu")
        on_device = torch.device(device or torch.empty(0).device).type == "cuda"
        return (made.to(DEVICE) if on_device else made).requires_grad_(requires_grad)

    with contextlib.ExitStack() as stack:

        def put(place: Any, name: str, value: Any) -> None:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        for name, value in CUDA.items():
            put(torch.cuda, name, value)
        # An optimizer asks it for its stream, which takes a driver where torch was built for CUDA.
        put(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        put(torch, "tensor", make_tensor)
        put(torch, "Generator", Generator)
        stack.enter_context(ptx_driver(CAPABILITY, search_races=False))
        for part in KERNEL_MODULES:
            module = importlib.import_module(f"montessori.kernels.triton.{part}")
            for name in [name for name in vars(module) if name.endswith("_launch")]:
                put(module, name, gpu.launch(getattr(module, name), name))
        # A parameter of another dtype is a new one: shared storage is what a wrapper does not have.
        stack.callback(set_overwrite_module_params_on_conversion, get_overwrite_module_params_on_conversion())
        set_overwrite_module_params_on_conversion(True)
        if cuda.load_error() is None:
            put(cuda, "driver_refusal", lambda: None)
            operator = torch.ops.montessori_cuda.linear_scores
            put(torch.ops.montessori_cuda, "linear_scores", partial(cuda_linear_scores, operator.default._schema))
        PretendGpu.now = gpu
        stack.enter_context(gpu)
        yield gpu


def to_device(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Move a model and the state of its optimizer onto the pretended GPU, in place; call within `pretended_gpu`.

    nn.Module.to cannot: it keeps the parameter and changes its storage, which a wrapper does not have.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, OnDevice):
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = moved[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, OnDevice):
                module._buffers[name] = OnDevice(buffer)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [moved[parameter] for parameter in group["params"]]
    state = {
        moved[parameter]: {name: OnDevice(value) if name != "step" else value for name, value in entry.items()}
        for parameter, entry in optimizer.state.items()
    }
    optimizer.state.clear()
    optimizer.state.update(state)


# Problems of `montessori.trial`, small ones.
CHECKED = {"CHECKED": ((24, 20, (5, 0, 1), 2),), "CROWDED": (24, 40, (3, 0, 17), 5)}


def once(work, repeats=1, waiting_cycles=0) -> float:
    """In the place of `montessori.trial.milliseconds`."""
    work()
    return 1.0
