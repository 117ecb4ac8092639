"""The launchers of csrc/cuda on this machine: their launches run as PTX."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from op_cases import Case

from montessori.spans import spans_of

from .machine import Launch, run
from .memory import Memory
from .text import Kernel, read_kernels

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Dynamic shared memory promises 128 bytes of alignment.
SHARED_BASE = 1024 + 128


class Launchers:
    """`library`: runtime.cpp linked with the objects of the sources; `ptx`: what the compiler made of each."""

    def __init__(self, library: Path, ptx: list[Path]):
        self.library = ctypes.CDLL(str(library))
        self.library.count_parts.restype = ctypes.c_int64
        self.ptx = ptx
        self.kernels: dict[str, Kernel] = {}
        for path in ptx:
            self.kernels |= read_kernels(path.read_text())

    def run(self, kernel: str, case: Case, splits: int = 1, seed: int = 0) -> torch.Tensor:
        """Scores [B, K] float64."""
        spans = aligned(torch.tensor(spans_of(case.offsets, case.starts)).reshape(-1, 2))
        tensors = [aligned(t) for t in (case.x, case.dy, case.q, case.exp_avg, case.exp_avg_sq, case.param)]
        arrays = (ctypes.c_void_p * 6)(*[tensor.data_ptr() for tensor in tensors])
        dtypes = (ctypes.c_int * 6)(*[CODES[tensor.dtype] for tensor in tensors])
        sizes = (ctypes.c_int * 5)(len(case.x), len(case.offsets) - 1, *case.q.shape)
        constants = (ctypes.c_float * 6)(*case.step.folded, case.step.weight_decay)
        parts = self.library.count_parts(kernel.encode(), arrays, dtypes, sizes)
        # A part that nobody writes shows as NaN.
        partial = aligned(torch.full((len(case.q), len(case.offsets), parts), torch.nan))
        scores = aligned(torch.full((len(case.offsets) - 1, len(case.q)), torch.nan, dtype=torch.float64))
        memory = Memory()
        names = ("x", "dy", "q", "exp_avg", "exp_avg_sq", "param", "spans", "partial", "scores")
        for name, tensor in zip(names, (*tensors, spans, partial, scores), strict=True):
            memory.add(name, tensor.data_ptr(), tensor.nbytes)
        failure: list[BaseException] = []

        def launched(name: bytes, grid: ctypes.Array, parameters: ctypes.Array) -> int:
            try:
                run(self._launch(name.decode(), grid, parameters), memory, seed)
            except BaseException as error:
                failure.append(error)
                return 1
            return 0

        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
        )(launched)
        error = self.library.run_linear(
            callback, kernel.encode(), arrays, dtypes, ctypes.c_void_p(spans.data_ptr()), sizes, constants, splits,
            ctypes.c_double(-case.step.lr), ctypes.c_void_p(partial.data_ptr()), ctypes.c_int64(parts),
            ctypes.c_void_p(scores.data_ptr()),
        )  # fmt: skip
        if failure:
            raise failure[0]
        assert error == 0, f"CUDA error {error}"
        return scores

    def _launch(self, name: str, sizes: ctypes.Array, parameters: ctypes.Array) -> Launch:
        kernel = self.kernels[name]
        given = bytearray(kernel.parameter_bytes)
        for index, (at, size) in enumerate(kernel.parameters.values()):
            given[at : at + size] = ctypes.string_at(parameters[index], size)
        grid_x, grid_y, threads, cluster, dynamic_bytes = sizes[:5]
        return Launch(kernel, (grid_x, grid_y), threads, bytes(given), dynamic_bytes, cluster, SHARED_BASE)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose memory starts on 64 bytes, as a GPU's does."""
    room = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
