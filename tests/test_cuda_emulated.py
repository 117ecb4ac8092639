"""The CUDA kernels run on the CPU by tests/emulated_cuda, against the specification in float64.

The sources of csrc/cuda are compiled unchanged; only the two headers that hold machine instructions are replaced. A
kernel that waits for something that never comes would hang, so every run has a process of its own with a time limit.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from op_cases import ADAMW, Case, bounds, linear_case, with_padding

from montessori import trial
from montessori.spans import spans_of

ROOT = Path(__file__).parents[1]
TOOLKITS = [path for path in (Path("/usr/local/cuda/include"), Path("/opt/cuda/include")) if (path / "cuda.h").exists()]
SOURCES = ("linear_mma.cu", "linear_wgmma.cu", "partials.cu", "entry.cpp")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LIMIT_S = 60
CHOOSE = 0  # splits, by the kernel itself

pytestmark = pytest.mark.skipif(not (TOOLKITS and shutil.which("g++")), reason="no g++ or no CUDA headers")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("emulated")
    for folder in (ROOT / "csrc/cuda", ROOT / "tests/emulated_cuda"):
        shutil.copytree(folder, build, dirs_exist_ok=True)
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", f"-I{TOOLKITS[0]}", "-include", "device.h", "-x", "c++"]
    compilers = [subprocess.Popen(["g++", *flags, "-c", name, "-o", f"{name}.o"], cwd=build) for name in SOURCES]
    assert [compiler.wait() for compiler in compilers] == [0] * len(SOURCES)
    objects = [f"{name}.o" for name in SOURCES]
    # Its own functions of the CUDA runtime, not those of a runtime that torch brought into the process.
    flags = ["-shared", "-Wl,-Bsymbolic", "-lpthread"]
    subprocess.run(["g++", "-o", "emulated.so", *objects, *flags], cwd=build, check=True)
    return build / "emulated.so"


def emulate(library: Path, kernel: str, case: Case, splits: int, scores: torch.Tensor) -> None:
    """Fill `scores` [B, K], which is in shared memory."""
    spans = torch.tensor(spans_of(case.offsets, case.starts)).reshape(-1, 2)
    tensors = [case.x, case.dy, case.q, case.exp_avg, case.exp_avg_sq, case.param]
    arrays = (ctypes.c_void_p * 6)(*[tensor.data_ptr() for tensor in tensors])
    dtypes = (ctypes.c_int * 6)(*[CODES[tensor.dtype] for tensor in tensors])
    sizes = (ctypes.c_int * 5)(len(case.x), len(case.offsets) - 1, *case.q.shape)
    constants = (ctypes.c_float * 6)(*case.step.folded, case.step.eps, case.step.weight_decay)
    error = ctypes.CDLL(str(library)).emulate(
        kernel.encode(), arrays, dtypes, ctypes.c_void_p(spans.data_ptr()), sizes, constants, splits,
        ctypes.c_double(-case.step.lr), ctypes.c_void_p(scores.data_ptr()),
    )  # fmt: skip
    assert error == 0


def run(library: Path, kernel: str, case: Case, splits: int = 1) -> torch.Tensor:
    scores = torch.full((len(case.offsets) - 1, len(case.q)), torch.nan, dtype=torch.float64).share_memory_()
    child = multiprocessing.get_context("fork").Process(target=emulate, args=(library, kernel, case, splits, scores))
    child.start()
    child.join(LIMIT_S)
    if child.is_alive():
        child.kill()
        pytest.fail(f"{kernel} did not end within {LIMIT_S} s: its threads wait for each other")
    assert child.exitcode == 0
    return scores


def ragged(operand=torch.bfloat16, state=torch.float32, num_out=136, num_in=136, lengths=(70, 0, 1, 64), sets=1):
    """More than one tile each way and none of them whole; an empty example, and lengths around a chunk."""
    case = linear_case(lengths, num_out, num_in, sets, ADAMW).to(torch.float32)
    case.x, case.dy = case.x.to(operand), case.dy.to(operand)
    case.q, case.exp_avg, case.exp_avg_sq = (t.to(state) for t in (case.q, case.exp_avg, case.exp_avg_sq))
    return case


KERNELS = ("mma", "wgmma", "wgmma_cluster")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("operand", "state", "sets"), [(torch.bfloat16, torch.float32, 2), (torch.float16, torch.bfloat16, 1)]
)
def test_scores_are_as_specified(library, kernel, operand, state, sets):
    case = ragged(operand, state, sets=sets)
    got = run(library, kernel, case)
    assert torch.all((got - case.to(torch.float64).specified()).abs() <= case.to(torch.float64).allowed(torch.float32))


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_several_tiles_of_a_cluster_are_as_specified(library, state):
    case = ragged(torch.bfloat16, state, num_out=264, num_in=264, lengths=(5, 70))
    got = run(library, "wgmma_cluster", case)
    assert torch.all((got - case.to(torch.float64).specified()).abs() <= case.to(torch.float64).allowed(torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_share_of_a_block_does_not_change_a_bit(library, kernel):
    case = ragged(lengths=(35, 3, 0, 65, 1), num_out=16, num_in=24)
    together = run(library, kernel, case)
    assert torch.equal(run(library, kernel, case, splits=3), together)
    assert torch.equal(run(library, kernel, case, splits=CHOOSE), together)
    alone = ragged(lengths=(35, 3, 0, 65, 1), num_out=16, num_in=24)
    alone.x, alone.dy, alone.offsets = alone.x[38:103].clone(), alone.dy[38:103].clone(), bounds(65)
    assert torch.equal(run(library, kernel, alone)[0], together[3])


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_between_the_examples_changes_no_bit(library, kernel):
    case = ragged(lengths=(35, 3, 0, 65), num_out=16, num_in=24)
    assert torch.equal(run(library, kernel, with_padding(case)), run(library, kernel, case))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broken_example_breaks_its_own_score_alone(library, kernel):
    case = ragged(lengths=(5, 67, 5), num_out=16, num_in=24)
    want = run(library, kernel, case)
    case.x[5], case.dy[71] = torch.nan, torch.nan  # the first and the last token of the second example
    got = run(library, kernel, case)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_cluster"])
def test_many_chunks_of_one_consumer_do_not_mislead_the_other(library, kernel):
    """Examples with more chunks than there are stages, so that phases of a stage's barrier repeat in between."""
    case = ragged(lengths=(330, 650, 65, 330), num_out=16, num_in=24)
    got = run(library, kernel, case)
    assert torch.all((got - case.to(torch.float64).specified()).abs() <= case.to(torch.float64).allowed(torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_check_that_a_device_gets_is_passed(library, kernel, monkeypatch):
    def on_the_cpu(x, dy, spans, q, exp_avg, exp_avg_sq, param, step, rows):
        lengths = [high - low for low, high in spans]
        starts = torch.tensor([low for low, _ in spans])
        case = Case(q, exp_avg, exp_avg_sq, param, step, x, dy, bounds(*lengths), rows, starts)
        return run(library, kernel, case)

    monkeypatch.setattr(trial, "CHECKED", trial.CHECKED[:2])
    assert trial.failures(trial.check(on_the_cpu, trial.NARROW[:1], trial.HELD, device="cpu")) == []
