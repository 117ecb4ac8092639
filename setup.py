"""Builds the CPU kernels where torch is installed; without them the package runs its plain torch code.

Metadata stands in pyproject.toml. Build against an installed torch with `pip install --no-build-isolation`.
"""

from __future__ import annotations

import os
import platform
import sys

from setuptools import setup

# Lowest torch whose stable interface the library uses: one binary serves it and every later one.
TORCH_FLOOR = "0x020b000000000000"
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}"]
SOURCES = ["register", "tiles", "packing", "kernel_baseline"]
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES += ["kernel_avx2", "kernel_avx512", "kernel_avx512bf16"]


def extension_arguments() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("montessori: torch is not installed here, the CPU kernels are not built", file=sys.stderr)
        return {}

    class BuildOrGoWithout(BuildExtension):
        """A machine without a compiler gets the package all the same, unless it asks not to."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if os.environ.get("MONTESSORI_REQUIRE_KERNELS"):
                    raise
                print(f"montessori: the CPU kernels could not be built: {error}", file=sys.stderr)
                self.extensions.clear()

    library = CppExtension(
        "montessori._cpu",
        [f"csrc/cpu/{name}.cpp" for name in SOURCES],
        include_dirs=["csrc/cpu"],
        extra_compile_args=FLAGS,
    )
    library.libraries = [name for name in library.libraries if name != "torch_python"]
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildOrGoWithout.with_options(no_python_abi_suffix=True)},
    }


setup(**extension_arguments())
