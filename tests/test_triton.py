"""The Triton kernels on a machine without a GPU: compiled ahead of time, on a pretended GPU, and out of the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_build import triton_cache

from montessori import AdamWStep, SGDStep, gpu, ops, tiles
from montessori.errors import ArgumentError

# All of them: what is compiled is compiled by one process.
pytestmark = pytest.mark.minutes
HERE = Path(__file__).parent
ROOT = HERE.parent
# Bytes of shared memory that one block may have, by capability.
SHARED_LIMIT = {"80": 163 * 1024, "89": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024, "120": 99 * 1024}
# Kernels of `compile_triton.py`: for every capability, for all but one, and those that one tells enough of.
PRODUCTS = {"linear bf16", "linear bf16, tied"}
SETS_AND_WIDTHS = {"linear bf16, five sets", "linear bf16, odd widths"}
MORE_PRODUCTS = {"linear bf16, SGD", "linear bf16, twenty sets", "cross entropy", "logits gradient"}
OTHERS = {"linear fp32", "elementwise", "step", "embedding", "partials", "row sums"}
# Of the checks on the pretended GPU, which take minutes: each a process of its own.
PRETENDED = [
    ("sections_on_pretended_gpu.py", ""),
    ("on_pretended_gpu.py", "every_kind"),
    ("on_pretended_gpu.py", "not every_kind"),
]
MATRIX_INSTRUCTION = {"80": "HMMA", "89": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "120": "HMMA"}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize(("checks", "chosen"), PRETENDED)
def test_everything_around_the_kernels_works_on_a_pretended_gpu(checks, chosen, tmp_path_factory):
    pytest.importorskip("triton")
    options = ("-q", "-p", "no:cacheprovider", "-k", chosen)
    done = run(
        "-m",
        "pytest",
        *options,
        HERE / checks,
        TRITON_CACHE_DIR=triton_cache(tmp_path_factory),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    pytest.importorskip("triton")
    cache = str(tmp_path_factory.mktemp("triton"))
    done = run(HERE / "compile_triton.py", *SHARED_LIMIT, TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_compile_within_the_resources_of_a_gpu(compiled, capability):
    products = PRODUCTS | (set() if capability == "89" else SETS_AND_WIDTHS)
    products, others = (products | MORE_PRODUCTS, OTHERS) if capability == "90" else (products, set())
    assert compiled[capability].keys() == products | others
    for name, used in compiled[capability].items():
        # 16 bytes of stack are two registers beside a loop; a spilled tile has hundreds.
        assert used["stack"] <= 16, f"{name}: {used}"
        assert used["shared"] <= SHARED_LIMIT[capability], f"{name}: {used}"
        on_tensor_cores = MATRIX_INSTRUCTION[capability] in used["matrix"]
        assert on_tensor_cores == (name in products), f"{name}: {used}"


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_an_element_costs_two_special_functions(compiled, capability):
    tile = tiles.held_tile(divmod(int(capability), 10))
    per_thread = tile.block_o * tile.block_i // (32 * tile.num_warps)
    # One square root and one reciprocal; two more for the index arithmetic of the tile.
    assert compiled[capability]["linear bf16"]["special"] <= 2 * per_thread + 4


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_both_factors_are_copied_ahead_of_the_product(compiled, capability):
    tile = tiles.held_tile(divmod(int(capability), 10))
    copied = compiled[capability]["linear bf16"]["copies"] * 16 * 32 * tile.num_warps
    # Every stage but one before the loop, and one in it.
    assert copied >= tile.num_stages * (tile.block_o + tile.block_i) * tile.block_t * torch.bfloat16.itemsize


def test_the_head_s_kernels_are_compiled_once_for_rows_from_anywhere(compiled):
    for name, written in (("cross entropy", set()), ("logits gradient", {"grad_ptr"})):
        assert {*compiled["90"][name]["kinds"]} == {"hidden_ptr", "weight_ptr", "H"} | written


def test_rows_that_are_loaded_element_by_element_have_a_smaller_tile():
    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    for capability in (80, 90, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "capability", lambda device, found=capability: divmod(found, 10))
            whole, *odd = (tiles.choose_tile(OnGpu, shape) for shape in ((64, 48), (50257, 64), (64, 41)))
        assert whole == tiles.held_tile(divmod(capability, 10))
        assert odd == [tiles.ODD] * 2


@pytest.mark.parametrize(
    "step",
    [
        AdamWStep(lr=np.float32(1e-3), beta1=np.float32(0.9), eps=np.float32(1e-8), weight_decay=np.float64(0.1)),
        AdamWStep(lr=1, eps=0, weight_decay=1, decoupled=False),
        SGDStep(lr=1, momentum=np.float32(0.5), weight_decay=1, step=3),
    ],
    ids=["numpy", "int", "SGD"],
)
def test_the_launcher_is_given_floats_whatever_the_step_was_made_of(step):
    given = gpu.StepMap.of(step, torch.ones(1))
    assert {type(number) for number in (given.lr, *given.constants)} == {float}
    assert {type(flag) for flag in given.flags.values()} == {bool}
    assert given.lr == step.lr


def test_the_package_works_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert gpu.unavailable() == "triton is not installed"
    assert "triton" not in ops.available_impls()


@pytest.mark.parametrize(
    ("kind", "version", "refused"),
    [((10, 0), "3.6.0", True), ((10, 3), "3.7.0+git1", True), ((10, 0), "3.7.1", False), ((9, 0), "3.6.0", False)],
)
def test_a_triton_whose_products_are_not_safe_on_a_device_is_refused_there(monkeypatch, kind, version, refused):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(tiles, "capability", lambda device: kind)
    monkeypatch.setattr(triton, "__version__", version)
    reason = gpu.too_old(torch.device("cuda"))
    assert (reason is not None) == refused
    if refused:
        assert f"this Triton, {version.split('+')[0]}," in reason and "install triton 3.7.1 or later" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_kernels_are_refused_by_name_with_the_reason():
    with pytest.raises(ArgumentError, match=r"impl='triton': .*(no CUDA device|not installed)"):
        ops.check_impl("triton")


def test_the_kernel_folder_stays_out_of_the_way_until_a_kernel_runs(tmp_path):
    """transformers looks for a package `kernels`; the folder of that name at the root must not answer for it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("marker = 1\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import kernels; assert kernels.marker == 1\n"
        "import montessori.ops\n"
        "assert not any('kernels.triton' in name for name in sys.modules), 'imported before a kernel ran'\n"
        "import importlib.util; assert importlib.util.find_spec('montessori.kernels.triton.linear')\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
