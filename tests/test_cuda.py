"""The CUDA kernels on a machine without a GPU: what the compiler makes of them, and how they are refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from cuda_build import compile_source, setup_module_of_the_build

from montessori import AdamWStep, SGDStep, calibration, cuda, ops
from montessori.cli import cli
from montessori.errors import ArgumentError, ResourceError

ENTRY = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg", re.S
)


@pytest.mark.parametrize(
    ("source", "kernels", "most_registers"),
    [
        # 256 threads of a block share 65,536 registers, so 255 each would still run; more than 192 is a regression.
        ("linear_mma", 8, 192),
        # 384 threads start with 168; the consumers take 232 from what the producer gives back.
        ("linear_wgmma", 8, 168),
    ],
)
def test_no_kernel_spills_registers(source, kernels, most_registers, tmp_path_factory):
    report = compile_source(tmp_path_factory, source).report
    entries = ENTRY.findall(report)
    # Two dtypes of operands by two of held state, and by two targets, or by clusters of one and of four blocks.
    assert len(entries) == kernels, report
    for name, stored, loaded, registers in entries:
        assert (int(stored), int(loaded)) == (0, 0), name
        assert int(registers) <= most_registers, name
    assert "warning" not in report.lower(), report
    assert "Performance Loss" not in report, report  # products that the compiler makes wait for each other


@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason="the CUDA kernels were not built")
def test_the_library_loads_without_a_driver():
    assert cuda.load_error() is None
    assert "kernel" in str(torch.ops.montessori_cuda.linear_scores.default._schema)
    assert cuda.built_archs() == tuple(setup_module_of_the_build().cuda_archs())


def test_kernels_can_be_switched_off_at_any_time(monkeypatch):
    before = cuda.load_error()
    monkeypatch.setenv("MONTESSORI_NO_KERNELS", "1")
    assert cuda.load_error() == "MONTESSORI_NO_KERNELS is set"
    monkeypatch.delenv("MONTESSORI_NO_KERNELS")
    assert cuda.load_error() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason="the CUDA kernels were not built")
def test_a_driver_that_does_not_run_the_library_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "driver" in cuda.driver_refusal()
    with pytest.raises(ArgumentError, match=f"cuda.*{cuda.driver_refusal()}"):
        ops.check_impl("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_kernels_are_refused_by_name_with_the_reason():
    assert "cuda" not in ops.available_impls()
    with pytest.raises(ArgumentError, match=r"impl='cuda': .*there is no CUDA device"):
        ops.check_impl("cuda")


def arguments(dtype=torch.bfloat16, size=16):
    x, dy = torch.ones(4, size, dtype=dtype), torch.ones(4, size, dtype=dtype)
    state = [torch.ones(2, size, size), *(torch.ones(size, size) for _ in range(3))]
    return [x, dy, *state, None]


@pytest.mark.parametrize(
    ("change", "step", "reason"),
    [
        ({}, AdamWStep(lr=0.1), "tensor on cpu"),
        ({0: torch.ones(4, 16)}, AdamWStep(lr=0.1), "x and dy in bfloat16 or both in float16"),
        ({5: torch.ones(16, 12)}, AdamWStep(lr=0.1), "sizes divisible by 8"),
        ({2: torch.ones(2, 16, 16).double()}, AdamWStep(lr=0.1), "state in float32"),
        ({0: torch.ones(0, 16).bfloat16()}, AdamWStep(lr=0.1), "no token"),
        ({5: torch.ones(257)[1:].view(16, 16)}, AdamWStep(lr=0.1), "multiple of 16 bytes"),
        ({6: torch.ones(1, 16)}, AdamWStep(lr=0.1), "tied"),
        ({}, AdamWStep(lr=0.1, weight_decay=0.1, decoupled=False), "L2"),
        ({}, AdamWStep(lr=0.1, beta1=0.0), "beta of 0"),
        ({}, AdamWStep(lr=0.1, beta2=0.0), "beta of 0"),
        ({}, SGDStep(lr=0.1), "no SGD"),
    ],
)
def test_arguments_that_the_kernels_do_not_take_are_named(monkeypatch, change, step, reason):
    """The rules are the same everywhere; only whether there is a device is answered for this machine."""
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    given = [change.get(position, tensor) for position, tensor in enumerate(arguments())]
    if reason != "tensor on cpu":
        monkeypatch.setattr(cuda, "_elsewhere", lambda param: None)
    assert reason in cuda.unsupported(step, *given)


def test_the_list_of_capabilities_is_read_from_the_environment(monkeypatch):
    build = setup_module_of_the_build()
    monkeypatch.setenv("MONTESSORI_CUDA_ARCHS", "80; 90a;")
    assert build.cuda_archs() == ["80", "90a"]
    monkeypatch.setenv("MONTESSORI_CUDA_ARCHS", "")
    assert build.cuda_archs() == []


def test_capabilities_that_the_compiler_does_not_know_are_left_out_by_name(monkeypatch, tmp_path, capsys):
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin/nvcc"
    compiler.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\n'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("MONTESSORI_CUDA_ARCHS", "80;90a;100")
    assert setup_module_of_the_build().known_archs(tmp_path) == ["80", "90a"]
    assert "does not know capability 100: built without it" in capsys.readouterr().err
    monkeypatch.setenv("MONTESSORI_REQUIRE_KERNELS", "1")
    with pytest.raises(SystemExit, match="does not know capability 100"):
        setup_module_of_the_build().known_archs(tmp_path)


def test_a_build_without_code_for_the_device_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "built_archs", lambda: ("80", "100"))
    monkeypatch.setattr(cuda.tiles, "capability", lambda device: (9, 0))
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0")
    assert cuda._elsewhere(on_gpu) == "this build has machine code for 80, 100, not for 90a"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_calibrated(monkeypatch):
    outcome = CliRunner().invoke(cli, ["calibrate"])
    assert isinstance(outcome.exception, ArgumentError) and "expected a CUDA device" in str(outcome.exception)
    # A process without the device says nothing of the kernel; one that hangs is left out with a reason.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ResourceError, match=r"triton could not be tried .*nothing is kept"):
        calibration._in_a_process("triton")
    monkeypatch.setattr(calibration, "LIMIT_S", 0.01)
    assert calibration._in_a_process("triton") == {"error": "took more than 0.01 s"}
