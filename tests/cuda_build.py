"""The CUDA sources as the package compiles them, once for all tests: the compiler's words, PTX, the launchers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
# Capabilities by source, as in setup.py but for the ones that no test looks at.
SOURCES = {"linear_mma": ("80", "100"), "linear_wgmma": ("90a",), "partials": ("80",)}


class Compiled(NamedTuple):
    report: str
    object: Path
    ptx: dict[str, Path]  # by capability


def setup_module_of_the_build():
    """setup.py as a module; it calls `setup()` on import, which does nothing but parse here."""
    spec = importlib.util.spec_from_file_location("montessori_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.argv = sys.argv, ["setup.py", "--quiet", "--version"]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.argv = before
    return module


def toolkit() -> Path:
    found = setup_module_of_the_build().cuda_toolkit()
    if found is None:
        pytest.skip("no CUDA toolkit")
    return found


def once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, shared by all processes of this run of the tests."""
    base = temporary.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def triton_cache(temporary: pytest.TempPathFactory) -> str:
    """Where all processes of this run of the tests keep what Triton compiles."""
    return str(once(temporary, "triton_kernels", lambda folder: None))


def compile_source(temporary: pytest.TempPathFactory, name: str) -> Compiled:
    archs, compiler = SOURCES[name], toolkit() / "bin/nvcc"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DNDEBUG", "-Xptxas", "-v", "--keep"]

    def make(folder: Path) -> None:
        report = run(compiler, *flags, *targets, "-c", ROOT / f"csrc/cuda/{name}.cu", "-o", "object.o", folder=folder)
        (folder / "report.txt").write_text(report)

    folder = once(temporary, f"cuda_{name}", make)
    ptx = {arch: folder / (f"{name}.compute_{arch}.ptx" if len(archs) > 1 else f"{name}.ptx") for arch in archs}
    return Compiled((folder / "report.txt").read_text(), folder / "object.o", ptx)


def link_launchers(temporary: pytest.TempPathFactory) -> Path:
    """The launchers of all sources, with the CUDA runtime of tests/ptx_machine."""
    objects = [compile_source(temporary, name).object for name in SOURCES]
    include = [f"-I{toolkit() / 'include'}", f"-I{ROOT / 'csrc/cuda'}"]

    def make(folder: Path) -> None:
        runtime = ROOT / "tests/ptx_machine/runtime.cpp"
        # Its own functions of the CUDA runtime, not those of a runtime that torch brought into the process.
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
        run("g++", *flags, *include, runtime, *objects, "-o", "launchers.so", "-lpthread", folder=folder)

    return once(temporary, "cuda_launchers", make) / "launchers.so"


def run(*command: object, folder: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def named(paths: Sequence[Compiled], arch: str) -> list[Path]:
    """PTX of each, for this capability where there is one."""
    return [compiled.ptx.get(arch, next(iter(compiled.ptx.values()))) for compiled in paths]
