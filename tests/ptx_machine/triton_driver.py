"""A driver for Triton whose device is this machine's CPU: kernels are compiled for a GPU and run as PTX.

Compiled is what a launch on such a GPU would compile: Triton itself chooses the variant by the arguments.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from montessori import gpu, impls, tiles

from .machine import Launch, run
from .memory import Memory
from .text import Kernel, read_kernels

FORMATS = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
           "fp32": "f", "fp64": "d"}  # fmt: skip
SHARED_BYTES = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}


class Launcher:
    """Called by Triton for every launch."""

    def __init__(self, source: Any, metadata: Any):
        self.types = list(source.signature.values())
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: Any, *rest: Any) -> None:
        arguments, driver = rest[4:], triton.runtime.driver.active
        assert z == 1
        given, memory = bytearray(), Memory()
        for name, kind, argument in zip(range(len(arguments)), self.types, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                storage = argument.untyped_storage()
                memory.add(f"argument {name}", storage.data_ptr(), storage.nbytes())
                value, form = argument.data_ptr(), "q"
            else:
                value, form = argument, FORMATS[kind]
            given += b"\0" * (-len(given) % struct.calcsize(form)) + struct.pack(f"<{form}", value)
        # Scratch memory, of which no kernel uses any.
        given += b"\0" * (-len(given) % 8) + struct.pack("<qq", 0, 0)
        threads, shared = 32 * self.metadata.num_warps, self.metadata.shared
        fenced = gpu.triton_version() >= gpu.LEAST_FENCING
        launch = Launch(
            kernel, (x, y), threads, bytes(given), shared,
            search_races=driver.search_races, copies_need_fence=fenced,
        )  # fmt: skip
        run(launch, memory, driver.seed)
        driver.launched.append(kernel)


class PtxDriver(DriverBase):
    """Of a GPU of compute capability `kind`; `launched` has the kernels that ran."""

    launcher_cls = Launcher

    def __init__(self, kind: tuple[int, int], seed: int, search_races: bool):
        self.kind, self.seed, self.search_races = kind, seed, search_races
        self.launched: list[Kernel] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[kind]}, load_binary=self._load
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.kind[0] + self.kind[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        """Of its own for each capability: Triton keeps compiled kernels by device."""
        return 10 * self.kind[0] + self.kind[1]

    def get_current_stream(self, device: int) -> int:
        return 0

    def _load(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        kernel = read_kernels(ptx.decode())[name]
        return kernel, kernel, 0, 0, 1024


@contextlib.contextmanager
def ptx_driver(kind: tuple[int, int], seed: int = 0, search_races: bool = True) -> Iterator[PtxDriver]:
    """Within, Triton launches for a GPU of this compute capability, whose memory is the CPU's."""
    driver = PtxDriver(kind, seed, search_races)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        binary = property(ptx_of, lambda self, machine_code: None)
        patch.setattr(triton.compiler.CompiledKernel, "kernel", binary, raising=False)
        yield driver


@contextlib.contextmanager
def compiled_for(kind: tuple[int, int], seed: int = 0) -> Iterator[PtxDriver]:
    """Within, `impl="triton"` takes tensors of the CPU as those of such a GPU."""
    with ptx_driver(kind, seed) as driver, pytest.MonkeyPatch.context() as patch:
        patch.setitem(impls._UNAVAILABLE, "triton", lambda: None)
        patch.setattr(gpu, "unsupported", gpu.of_other_dtypes)
        patch.setattr(tiles, "capability", lambda device: kind)
        patch.setattr(tiles, "num_processors", lambda device: 1)
        for name in ("choose_tile", "choose_logits_tile"):
            patch.setattr(tiles, name, as_on_gpu(getattr(tiles, name)))
        yield driver


def ptx_of(compiled: Any) -> bytes:
    return compiled.asm["ptx"].encode()


def as_on_gpu(choose: Callable[..., tiles.Tile]) -> Callable[..., tiles.Tile]:
    """The choice of a tile for operands that lie on a GPU."""

    def choose_there(operand: torch.Tensor, *shape: Any) -> tiles.Tile:
        return choose(SimpleNamespace(device=torch.device("cuda"), dtype=operand.dtype), *shape)

    return choose_there
