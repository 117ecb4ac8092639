"""The Triton kernels, compiled for a GPU and run as PTX on the CPU (tests/ptx_machine), against the specification.

What Triton compiles at a launch depends on the arguments; here it is what it would compile on such a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cuda_build import triton_cache
from op_cases import (
    ADAMW,
    HOSTILE,
    STEPS,
    SUMS,
    Case,
    assert_specified,
    assert_step_specified,
    assert_sums_specified,
    embedding_case,
    linear_case,
    make_state,
    ready_case,
    with_padding,
)
from ptx_machine.triton_driver import compiled_for
from support import make_model, make_rows, warm_optimizer

from montessori import InfluenceEstimator, gpu, head, ops, tiles
from montessori.errors import ArgumentError

HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def device(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", triton_cache(tmp_path_factory))
    with compiled_for(HOPPER) as driver:
        yield driver


# Several tiles and steps in every direction, none of them whole.
CASES = HOSTILE | {
    "many_of_one_token": linear_case((1,) * 9, num_out=3, num_in=2),
    "several_tiles": linear_case((37, 0, 1, 16), num_out=100, num_in=70),
    "several_tiles_tied": linear_case((20, 3, 0), num_out=130, num_in=19, tied=(40, 0, 3)),
    "more_tiles_than_a_group": linear_case((2, 1), num_out=550, num_in=70, sets=3),
    "wide_table": embedding_case((9, 0, 4, 1), table=5, width=2 * tiles.BLOCK_ELEMENTS + 3),
    "as_many_touched_rows_as_examples": embedding_case((0, 2, 1), table=3, width=tiles.BLOCK_ELEMENTS + 1),
    "several_blocks": ready_case((tiles.BLOCK_ELEMENTS + 5, 2)),
}
# Narrow factors have a tile for widths that are divisible by 16, and one for others.
NARROW = {
    "aligned": linear_case((70, 0, 1, 130), num_out=144, num_in=80),
    "aligned_tied": linear_case((40, 0, 3), num_out=272, num_in=80, sets=1, tied=(30, 5, 0)),
    "aligned_five_sets": linear_case((20, 3), num_out=144, num_in=48, sets=5),
    "aligned_sgd": linear_case((20, 3), num_out=144, num_in=48, sets=1, step=STEPS["sgd_momentum"]),
    "odd_tied": linear_case((40, 0, 3), num_out=139, num_in=37, tied=(30, 5, 0)),
    "odd_l2": linear_case((20, 70), num_out=70, num_in=50, sets=1, step=STEPS["adam_l2"], tied=(5, 6)),
}


@pytest.mark.parametrize("kind", [(8, 0), HOPPER, (12, 0)], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_scores_of_narrow_factors_are_as_specified_on_every_kind_of_tensor_cores(kind, name):
    with compiled_for(kind) as driver:
        assert_specified(NARROW[name], torch.bfloat16, "triton")
    assert [kernel.name for kernel in driver.launched] == ["linear_influence_kernel", "sum_partials_kernel"]


@pytest.mark.parametrize("kind", [(8, 0), HOPPER], ids=str)
def test_float32_factors_are_rounded_where_torch_s_switch_says_so(monkeypatch, kind):
    monkeypatch.setattr(gpu, "gpu_rounds_products", lambda: True)
    case = linear_case((70, 0, 1, 64), num_out=144, num_in=80).to(torch.float32)
    with compiled_for(kind):
        got = case.run(impl="triton")
    # The ten bits of a TF32 number.
    x, dy = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (case.x, case.dy))
    rounded = replace(case, x=x, dy=dy)
    wide = rounded.to(torch.float64)
    assert torch.all((got - wide.specified()).abs() <= rounded.allowed(torch.float32))
    assert not torch.all((got - case.to(torch.float64).specified()).abs() <= rounded.allowed(torch.float32))


def test_no_schedule_of_warps_and_copies_changes_a_bit():
    case = NARROW["aligned"].to(torch.bfloat16)
    scores = []
    for seed in range(4):
        with compiled_for(HOPPER, seed):
            scores.append(case.run(impl="triton"))
    assert all(torch.equal(again, scores[0]) for again in scores[1:])


@pytest.mark.parametrize("name", CASES)
def test_scores_are_as_specified(name):
    assert_specified(CASES[name], torch.float32, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["several_tiles_tied", "wide_table", "several_blocks"])
def test_scores_of_narrow_inputs_are_as_specified(name, dtype):
    assert_specified(CASES[name], dtype, "triton")


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", ["tied", "table", "matrix"])
def test_scores_of_every_optimizer_are_as_specified(name, step):
    case = CASES[name]
    assert_specified(replace(case, **make_state(tuple(case.param.shape), len(case.q), step)), torch.float32, "triton")


def narrow_state(case: Case) -> Case:
    names = ("q", "exp_avg", "exp_avg_sq")
    return replace(case.to(torch.float32), **{name: getattr(case, name).bfloat16() for name in names})


@pytest.mark.parametrize("name", ["several_tiles", "wide_table", "several_blocks"])
def test_state_in_bfloat16_is_computed_in_float32(name):
    narrow = narrow_state(CASES[name])
    want, got = narrow.to(torch.float64).specified(), narrow.run(impl="triton")
    assert torch.all((got - want).abs() <= narrow.to(torch.float32).allowed(torch.float32))


@pytest.mark.parametrize("step", [STEPS["adamw"], STEPS["adam_l2"]], ids=["adamw", "adam_l2"])
def test_rows_that_have_a_gradient_from_elsewhere_change_as_specified(step):
    case = replace(CASES["wide_table"], **make_state(tuple(CASES["wide_table"].param.shape), 2, step))
    generator = torch.Generator().manual_seed(4)
    base = []
    for low, high in pairwise(case.offsets.tolist() if case.offsets is not None else case.rows.offsets.tolist()):
        # One row more than the example touches, where there is room.
        ids = torch.cat([case.rows.ids[low:high], torch.tensor([2])]).unique()
        base.append((ids, torch.randn(len(ids), case.param.shape[1], generator=generator, dtype=torch.float64)))
    want = ops.row_changes(case.rows, *case.state, base=base, impl="reference")
    narrow = case.to(torch.float32)
    narrow_base = [(ids, grad.float()) for ids, grad in base]
    plain = ops.row_changes(narrow.rows, *narrow.state, base=narrow_base, impl="reference")
    got = ops.row_changes(narrow.rows, *narrow.state, base=narrow_base, impl="triton")
    # The plain path subtracts two sums over whole rows and loses what they share; the kernel subtracts by element.
    assert torch.all((got - want).abs() <= 2 * (plain - want).abs() + 8 * torch.finfo(torch.float32).eps * want.abs())


@pytest.mark.parametrize("tile", [tiles.RIVALS[0], tiles.RIVALS[4]], ids=str)
def test_tiles_that_are_measured_beside_the_choice_give_the_specified_scores(monkeypatch, tile):
    monkeypatch.setattr(tiles, "choose_tile", lambda operand, shape: tile)
    assert_specified(NARROW["aligned"], torch.bfloat16, "triton")


def test_an_example_has_the_same_bits_alone_in_a_batch_and_in_programs_of_its_own(monkeypatch):
    case = CASES["several_tiles_tied"].to(torch.float32)
    together = case.run(impl="triton")
    monkeypatch.setattr(tiles, "examples_per_program", lambda num_tiles, num_examples, device: 1)
    assert torch.equal(case.run(impl="triton"), together)
    for b, (low, high) in enumerate(zip(case.offsets[:-1].tolist(), case.offsets[1:].tolist(), strict=True)):
        first, last = case.rows.offsets[b : b + 2].tolist()
        rows = replace(
            case.rows, ids=case.rows.ids[first:last], grad=case.rows.grad[first:last],
            offsets=torch.tensor([0, last - first]),
        )  # fmt: skip
        alone = replace(
            case, x=case.x[low:high], dy=case.dy[low:high], offsets=torch.tensor([0, high - low]), rows=rows
        )
        assert torch.equal(alone.run(impl="triton")[0], together[b])


@pytest.mark.parametrize("name", ["several_tiles", "several_tiles_tied", "empty_at_both_ends", "no_example"])
def test_padding_between_the_examples_changes_no_bit(name):
    case = CASES[name].to(torch.float32)
    assert torch.equal(with_padding(case).run(impl="triton"), case.run(impl="triton"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_example_breaks_its_own_score_alone(value):
    case = CASES["several_tiles"].to(torch.float32)
    want = case.run(impl="triton")
    broken = case.x.clone()
    broken[0, 3] = value
    got = replace(case, x=broken).run(impl="triton")
    assert got[0].isnan().all()
    assert torch.equal(got[1:], want[1:])


def test_without_epsilon_the_edge_of_a_tile_stays_out_of_the_score():
    step = replace(ADAMW, eps=0.0)
    for name in ("ordinary", "matrix", "table"):
        assert CASES[name].to(torch.float32).run(impl="triton").isfinite().all()
        assert_specified(replace(CASES[name], step=step), torch.float32, "triton")


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_step_itself_is_as_specified_and_can_be_taken_back(step):
    assert_step_specified((3, 700), step, torch.float32, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_sums_over_the_rows_of_examples_are_as_specified(name, dtype):
    assert_sums_specified(name, dtype, "triton")


def head_case(num_rows=17, width=19, num_words=531):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (num_rows, num_words))
    return hidden, weight, torch.randint(0, num_words, (num_rows,), generator=generator)


HEAD_DTYPES = pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)


@HEAD_DTYPES
@pytest.mark.parametrize("shape", [(17, 19, 531), (1, 1, 1), (16, 16, 16)])
def test_token_losses_are_those_of_the_logits(dtype, of_weight, shape):
    hidden, weight, targets = head_case(*shape)
    hidden, weight = hidden.to(dtype), weight.to(of_weight)
    losses, lse = gpu.linear_cross_entropy(hidden, weight, targets)
    logits = hidden.double() @ weight.double().T
    want = F.cross_entropy(logits, targets, reduction="none")
    plain = F.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="none")
    # A rounding for each of the width + 8 operations on the largest logit, and twice the plain path's error.
    largest = (hidden.double().abs() @ weight.double().abs().T).amax(1)
    allowed = 2 * (plain - want).abs() + (shape[1] + 8) * torch.finfo(torch.float32).eps * (1 + largest)
    assert torch.all((losses - want).abs() <= allowed)
    assert torch.all((lse - logits.logsumexp(1)).abs() <= allowed)


@HEAD_DTYPES
def test_blocks_of_the_logits_gradient_are_those_of_autograd(dtype, of_weight):
    hidden, weight, targets = head_case()
    hidden, weight = hidden.to(dtype), weight.to(of_weight)
    scale = torch.linspace(0.1, 1, len(targets), dtype=torch.float64)
    logits = (hidden.double() @ weight.double().T).requires_grad_()
    (F.cross_entropy(logits, targets, reduction="none") * scale).sum().backward()
    _, lse = gpu.linear_cross_entropy(hidden, weight, targets)
    blocks = list(gpu.logits_gradient(hidden, weight, targets, lse, scale, num_words=200))
    assert [(span.start, span.stop) for span, _ in blocks] == [(0, 200), (200, 400), (400, 531)]
    got = torch.cat([block for _, block in blocks], dim=1)
    assert got.dtype is dtype
    # exp turns the absolute error of logit − lse, some width + 8 roundings of the largest logit, into a relative one.
    largest = (hidden.double().abs() @ weight.double().abs().T).max()
    error = (hidden.shape[1] + 8) * torch.finfo(torch.float32).eps * (1 + largest) * scale[:, None]
    stored = torch.finfo(dtype).eps * logits.grad.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert torch.all((got - logits.grad).abs() <= error + stored)


def test_an_example_whose_logits_do_not_fit_goes_by_these_kernels(monkeypatch):
    model = make_model("llama_tied", torch.float32)
    optimizer, rows, references = warm_optimizer(model), make_rows(3, seed=1), make_rows(2, seed=2)
    # An anchor would add the difference of two float32 losses, of whose roundings no influence is free.
    options = {"method": "first_order", "backend": "triton"}
    whole = InfluenceEstimator(model, optimizer, references, **options).score(rows)
    # Seven words at a time for the longest example, and less than its logits for every other.
    monkeypatch.setattr(head, "most_logits", lambda hidden, weight: 7 * 8)
    calls, blocks_of = [], gpu.logits_gradient
    monkeypatch.setattr(gpu, "logits_gradient", lambda *given: calls.append(given) or blocks_of(*given))
    parts = InfluenceEstimator(model, optimizer, references, **options).score(rows)
    assert len(calls) >= len(rows) + len(references)
    # Float32 sums of the same terms: some hundred roundings of the largest score.
    allowed = 100 * torch.finfo(torch.float32).eps
    assert abs(parts.influence - whole.influence).max() <= allowed * abs(whole.influence).max()
    assert abs(parts.loss - whole.loss).max() <= allowed * whole.loss.max()


def test_no_label_position_gives_no_loss():
    hidden, weight, targets = head_case(0, 4, 9)
    assert gpu.linear_cross_entropy(hidden.float(), weight.float(), targets)[0].shape == (0,)


def test_arguments_that_do_not_fit_are_refused_by_name():
    assert "triton" in ops.available_impls()
    for name in ("ordinary", "table", "matrix"):
        with pytest.raises(ArgumentError, match=r"impl='triton': it computes in float32 from .*got torch.float64"):
            CASES[name].run(impl="triton")


def test_an_estimator_gives_the_same_scores_by_these_kernels():
    model = make_model("llama_tied", torch.float32)
    optimizer, rows, references = warm_optimizer(model), make_rows(3, seed=1), make_rows(2, seed=2)
    scores = {
        backend: InfluenceEstimator(model, optimizer, references, backend=backend, pilot=1).score(rows).influence
        for backend in ("triton", "reference")
    }
    # Both are float32 sums of the same terms: some hundred roundings of the largest score.
    largest = abs(scores["reference"]).max()
    assert abs(scores["triton"] - scores["reference"]).max() <= 100 * torch.finfo(torch.float32).eps * largest
