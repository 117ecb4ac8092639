"""The CUDA kernels, as PTX on the CPU (tests/ptx_machine), against the specification in float64.

What runs is the compiler's output for the package's own sources, started by the package's own launchers.
"""

from __future__ import annotations

import re
import shutil

import cuda_build
import pytest
import torch
from op_cases import ADAMW, Case, bounds, linear_case, with_padding
from ptx_machine.launching import Launchers
from ptx_machine.memory import FaultError
from ptx_machine.text import Immediate, Kernel, read_kernels

from montessori import tiles, trial

CHOOSE = 0  # splits, by the kernel itself
KERNELS = ("mma", "wgmma", "wgmma_cluster")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def launchers(temporary: pytest.TempPathFactory, arch: str) -> Launchers:
    sources = [cuda_build.compile_source(temporary, name) for name in cuda_build.SOURCES]
    return Launchers(cuda_build.link_launchers(temporary), cuda_build.named(sources, arch))


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Launchers:
    return launchers(tmp_path_factory, "80")


def ragged(operand=torch.bfloat16, state=torch.float32, num_out=136, num_in=136, lengths=(70, 0, 1, 64), sets=1):
    """More than one tile each way and none of them whole; an empty example, and lengths around a chunk."""
    case = linear_case(lengths, num_out, num_in, sets, ADAMW).to(torch.float32)
    case.x, case.dy = case.x.to(operand), case.dy.to(operand)
    case.q, case.exp_avg, case.exp_avg_sq = (t.to(state) for t in (case.q, case.exp_avg, case.exp_avg_sq))
    return case


def is_specified(case: Case, scores: torch.Tensor) -> bool:
    wide = case.to(torch.float64)
    return bool(torch.all((scores - wide.specified()).abs() <= wide.allowed(torch.float32)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("operand", "state", "sets"), [(torch.bfloat16, torch.float32, 2), (torch.float16, torch.bfloat16, 1)]
)
def test_scores_are_as_specified(device, kernel, operand, state, sets):
    case = ragged(operand, state, sets=sets)
    assert is_specified(case, device.run(kernel, case))


def test_scores_are_as_specified_where_it_is_compiled_for_capability_10(tmp_path_factory):
    case = ragged(sets=2)
    assert is_specified(case, launchers(tmp_path_factory, "100").run("mma", case))


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_several_tiles_of_a_cluster_are_as_specified(device, state):
    case = ragged(torch.bfloat16, state, num_out=264, num_in=264, lengths=(5, 70))
    assert is_specified(case, device.run("wgmma_cluster", case))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_schedule_of_warps_and_copies_changes_a_bit(device, kernel):
    """Examples with more chunks than there are stages, so that phases of a stage's barrier repeat in between."""
    case = ragged(lengths=(330, 650, 65, 330), num_out=16, num_in=24)
    scores = device.run(kernel, case)
    assert is_specified(case, scores)
    for seed in (1, 2, 3):
        assert torch.equal(device.run(kernel, case, seed=seed), scores)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_share_of_a_block_does_not_change_a_bit(device, kernel):
    case = ragged(lengths=(35, 3, 0, 65, 1), num_out=16, num_in=24)
    together = device.run(kernel, case)
    assert torch.equal(device.run(kernel, case, splits=3), together)
    assert torch.equal(device.run(kernel, case, splits=CHOOSE), together)
    alone = ragged(lengths=(35, 3, 0, 65, 1), num_out=16, num_in=24)
    alone.x, alone.dy, alone.offsets = alone.x[38:103].clone(), alone.dy[38:103].clone(), bounds(65)
    assert torch.equal(device.run(kernel, alone)[0], together[3])


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_between_the_examples_changes_no_bit(device, kernel):
    case = ragged(lengths=(35, 3, 0, 65), num_out=16, num_in=24)
    assert torch.equal(device.run(kernel, with_padding(case)), device.run(kernel, case))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_broken_example_breaks_its_own_score_alone(device, kernel):
    case = ragged(lengths=(5, 67, 5), num_out=16, num_in=24)
    want = device.run(kernel, case)
    case.x[5], case.dy[71] = torch.nan, torch.nan  # the first and the last token of the second example
    got = device.run(kernel, case)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], want[[0, 2]])


def layouts_of_b(kernel: Kernel) -> set[int]:
    """What the descriptors of B say of its layout: all but where it starts."""
    products = {one.operands[2] for one in kernel.code if one.opcode[:2] == ("wgmma", "mma_async")}
    made = [one for one in kernel.code if one.operands and one.operands[0] in products]
    return {part.value >> 14 << 14 for one in made for part in one.operands if isinstance(part, Immediate)}


def test_operands_lie_as_the_compiler_of_triton_lays_them_for_the_same_product(device, tmp_path_factory, monkeypatch):
    pytest.importorskip("triton")
    from ptx_machine.triton_driver import compiled_for

    monkeypatch.setenv("TRITON_CACHE_DIR", cuda_build.triton_cache(tmp_path_factory))
    # As here, 64 columns of 64 tokens in a row of boxes, and products of 64 × 128.
    monkeypatch.setattr(tiles, "choose_tile", lambda operand, shape: tiles.Tile(128, 128, 64, 8, 3, hold=False))
    with compiled_for((9, 0)) as driver:
        linear_case((70,), num_out=144, num_in=144, sets=1).to(torch.bfloat16).run(impl="triton")
    theirs, ours = driver.launched[0], [one for name, one in device.kernels.items() if "wgmma" in name]
    for kernel in (theirs, *ours):
        shapes = {one.opcode[4] for one in kernel.code if one.opcode[:2] == ("wgmma", "mma_async")}
        flags = {one.operands[-2:] for one in kernel.code if one.opcode[:2] == ("wgmma", "mma_async")}
        assert shapes == {"m64n128k16"}
        assert {tuple(part.text for part in pair) for pair in flags} == {("1", "1")}
    assert len(layouts_of_b(theirs)) == 1
    assert all(layouts_of_b(one) == layouts_of_b(theirs) for one in ours)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_check_that_a_device_gets_is_passed(device, kernel, monkeypatch):
    def on_the_cpu(x, dy, spans, q, exp_avg, exp_avg_sq, param, step, rows):
        lengths = [high - low for low, high in spans]
        starts = torch.tensor([low for low, _ in spans])
        case = Case(q, exp_avg, exp_avg_sq, param, step, x, dy, bounds(*lengths), rows, starts)
        return device.run(kernel, case)

    monkeypatch.setattr(trial, "CHECKED", trial.CHECKED[:2])
    assert trial.failures(trial.check(on_the_cpu, trial.NARROW[:1], trial.HELD, device="cpu")) == []


@pytest.mark.parametrize(
    ("kernel", "instruction", "instead", "found"),
    [
        ("mma", r"bar\.sync\s+0;", "", "may not have written yet"),
        ("mma", r"cp\.async\.wait_group \d+;", "cp.async.wait_group 7;", "may still be reading"),
        ("mma", r"\.x4\.trans\.", ".x4.", None),
        ("mma", r"\], 16, %r\d+;", "], 16;", None),
        ("wgmma", r"fence\.proxy\.async\.shared::cta;", "", "without a fence for the tensor cores"),
        ("wgmma", r"1, 1, 1, 1, 1;", "1, 1, 1, 0, 1;", None),
        ("wgmma", r"\{(%f\d+), (%f\d+), ", r"{\2, \1, ", None),
        ("wgmma", r"wgmma\.wait_group\.sync\.aligned 0;", "", None),
        ("wgmma", r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", "may still be reading"),
        ("wgmma", r"bar\.sync %r\d+, %r\d+;", "", "may not have written yet"),
        ("wgmma", r"@done bra ready", "bra ready", "more arrivals"),
        ("wgmma", r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", "all threads wait"),
        ("wgmma_cluster", r"mbarrier\.arrive\.shared::cluster\.b64 _, \[there\];", "", "all threads wait"),
        ("wgmma_cluster", r"barrier\.cluster\.wait\.acquire;", "", "no mbarrier was initialised"),
    ],
    ids=[
        "block barrier", "copies awaited", "transposed rows", "zeros past the end", "fence after stores",
        "transposed B", "order of accumulators", "products awaited", "products awaited in time", "named barriers",
        "wait for a stage", "stage released", "stage released elsewhere", "cluster barrier",
    ],
)  # fmt: skip
def test_an_instruction_left_out_or_spoiled_would_be_found(device, monkeypatch, kernel, instruction, instead, found):
    source = "linear_mma" if kernel == "mma" else "linear_wgmma"
    text = next(path for path in device.ptx if source in path.name).read_text()
    spoiled, times = re.subn(instruction, instead, text)
    assert times > 0
    monkeypatch.setattr(device, "kernels", device.kernels | read_kernels(spoiled))
    case = ragged(lengths=(70, 5, 0, 330, 1, 64))
    if found is None:
        assert not is_specified(case, device.run(kernel, case))
    else:
        with pytest.raises(FaultError, match=found):
            device.run(kernel, case)
