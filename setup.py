"""Builds the CPU kernels where torch is installed, and the CUDA kernels where a CUDA toolkit is too.

Without them the package runs its plain torch code. Metadata stands in pyproject.toml. Build against an installed
torch with `pip install --no-build-isolation`.

    MONTESSORI_CUDA_ARCHS   capabilities to build for, by default "80;90a;100"; empty for no CUDA kernels
    CUDA_HOME               the toolkit, where it is not found by itself
    MONTESSORI_REQUIRE_KERNELS   fail instead of going without
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# Lowest torch whose stable interface the library uses: one binary serves it and every later one.
TORCH_FLOOR = "0x020b000000000000"
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"]
SOURCES = ["register", "tiles", "squares", "packing", "kernel_baseline"]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += ["kernel_avx2", "kernel_avx512", "kernel_avx512bf16", "kernel_amx"]
DEVICE_SOURCES = ["linear_mma", "partials"]
# Needs instructions of this one capability.
HOPPER_SOURCE, HOPPER = "linear_wgmma", "90a"


def cuda_archs() -> list[str]:
    return [arch.strip() for arch in os.environ.get("MONTESSORI_CUDA_ARCHS", "80;90a;100").split(";") if arch.strip()]


def cuda_toolkit() -> Path | None:
    """Directory with the CUDA compiler and its headers; an nvcc on PATH may be a script that stands elsewhere."""
    on_path = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", on_path and Path(on_path).resolve().parents[1]]
    for place in filter(None, places):
        if (Path(place) / "include/cuda_runtime_api.h").exists() and (Path(place) / "bin/nvcc").exists():
            return Path(place)
    return None


def known_archs(toolkit: Path) -> list[str]:
    """Those of `cuda_archs` that this compiler can build for; the others are named, not passed over in silence."""
    command = [str(toolkit / "bin/nvcc"), "--list-gpu-arch"]
    listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    known = [arch for arch in cuda_archs() if f"compute_{arch.rstrip('af')}" in listed]
    unknown = [arch for arch in cuda_archs() if arch not in known]
    if unknown and os.environ.get("MONTESSORI_REQUIRE_KERNELS"):
        raise SystemExit(f"montessori: {toolkit} does not know capability {', '.join(unknown)}")
    for arch in unknown:
        print(f"montessori: {toolkit} does not know capability {arch}: built without it", file=sys.stderr)
    return known


def compile_device_code(toolkit: Path, build: Path, archs: list[str]) -> list[str]:
    """Object files of the CUDA sources, each for all its capabilities."""
    build.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DNDEBUG"]
    sources = dict.fromkeys(DEVICE_SOURCES, archs)
    if HOPPER in archs:
        sources[HOPPER_SOURCE] = [HOPPER]
    objects = []
    for name, chosen in sources.items():
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
        objects.append(str(build / f"{name}.o"))
        command = [toolkit / "bin/nvcc", *flags, *targets, "-c", f"csrc/cuda/{name}.cu", "-o", objects[-1]]
        subprocess.run([str(part) for part in command], check=True)
    return objects


def extension_arguments() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if os.environ.get("MONTESSORI_REQUIRE_KERNELS"):
            raise SystemExit(
                "montessori: MONTESSORI_REQUIRE_KERNELS asks for compiled kernels, and torch is not installed here: "
                "install it, then build with pip install --no-build-isolation"
            ) from None
        print("montessori: torch is not installed here, the compiled kernels are not built", file=sys.stderr)
        return {}

    class BuildOrGoWithout(BuildExtension):
        """A machine without a compiler gets the package all the same, unless it asks not to."""

        def build_extensions(self) -> None:
            everything = self.extensions
            for extension in everything:
                self.extensions = [extension]
                try:
                    if extension is cuda_library:
                        extension.extra_objects = compile_device_code(toolkit, Path(self.build_temp) / "cuda", archs)
                    super().build_extensions()
                except Exception as error:
                    if os.environ.get("MONTESSORI_REQUIRE_KERNELS"):
                        raise
                    print(f"montessori: {extension.name} could not be built: {error}", file=sys.stderr)
                    everything = [other for other in everything if other is not extension]
            self.extensions = everything

    libraries = [
        CppExtension(
            "montessori._cpu",
            [f"csrc/cpu/{name}.cpp" for name in SOURCES],
            include_dirs=["csrc/cpu"],
            extra_compile_args=FLAGS,
        )
    ]
    toolkit, cuda_library = cuda_toolkit(), None
    archs = known_archs(toolkit) if toolkit is not None and cuda_archs() else []
    if toolkit is not None and archs:
        without_hopper = [] if HOPPER in archs else ["-DMONTESSORI_WITHOUT_WGMMA"]
        cuda_library = CppExtension(
            "montessori._cuda",
            ["csrc/cuda/register.cpp"],
            include_dirs=["csrc/cuda", str(toolkit / "include")],
            library_dirs=[str(toolkit / "lib64"), *map(str, toolkit.glob("targets/*-linux/lib"))],
            libraries=["cudart_static", "rt", "pthread", "dl"],
            extra_compile_args=[*FLAGS, *without_hopper, f"-DMONTESSORI_ARCHS={','.join(archs)}"],
        )
        libraries.append(cuda_library)
    for library in libraries:
        library.libraries = [name for name in library.libraries if name != "torch_python"]
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_ext": BuildOrGoWithout.with_options(no_python_abi_suffix=True)},
    }


setup(**extension_arguments())
