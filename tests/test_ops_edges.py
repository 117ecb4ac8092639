"""What the entries of `montessori.ops` do at the edge: wrong arguments, mixed dtypes, writes that others must see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from op_cases import embedding_case, every_impl, linear_case, ready_case, simd_levels

from montessori import AdamWStep, SGDStep, ops, reference
from montessori.errors import ArgumentError
from montessori.ops import SparseRows

STEP = AdamWStep(lr=0.1, step=3)


def table(num_rows=7, width=5, sets=1):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (num_rows, width)
    state = [normal(sets, *shape), normal(*shape), normal(*shape).square() + 0.1, normal(*shape)]
    return SparseRows(torch.tensor([1, 4, 4, 0]), normal(4, width), torch.tensor([0, 3, 4])), state


def changed(rows, **fields):
    return SparseRows(**{"ids": rows.ids, "grad": rows.grad, "offsets": rows.offsets} | fields)


def spoiled(what):
    rows, state = table()
    base = [(torch.tensor([1, 4]), torch.ones(2, 5)), (torch.tensor([0]), torch.ones(1, 5))]
    if what == "narrow state":
        state[1] = state[1][:, :1]
    elif what == "short state":
        state[2] = state[2][:3]
    elif what == "negative id":
        rows = changed(rows, ids=torch.tensor([1, 4, -1, 0]))
    elif what == "large id":
        rows = changed(rows, ids=torch.tensor([1, 4, 7, 0]))
    elif what == "narrow gradient":
        rows = changed(rows, grad=rows.grad[:, :2])
    elif what == "offsets too far":
        rows = changed(rows, offsets=torch.tensor([0, 3, 9]))
    elif what == "offsets that fall":
        rows = changed(rows, offsets=torch.tensor([0, 5, 4]))
    elif what == "no base of an example":
        base = base[:1]
    elif what == "a touched row without base":
        base[0] = (torch.tensor([1]), torch.ones(1, 5))
    elif what == "unsorted base":
        base[0] = (torch.tensor([4, 1]), torch.ones(2, 5))
    elif what == "narrow base":
        base[0] = (torch.tensor([1, 4]), torch.ones(2, 1))
    return rows, state, base


@every_impl
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("narrow state", r"exp_avg: expected shape param\.shape = \[7, 5\], got \[7, 1\]"),
        ("short state", r"exp_avg_sq: expected shape"),
        ("negative id", r"rows\.ids: expected ids in 0\.\.6, got -1\.\.4"),
        ("large id", r"rows\.ids: expected ids in 0\.\.6, got 0\.\.7"),
        ("narrow gradient", r"rows\.grad: expected shape \[T, I\] = \[4, 5\]"),
        ("offsets too far", r"rows\.offsets: expected to run from 0 to 4"),
        ("offsets that fall", r"rows\.offsets: expected sorted offsets, got 5 then 4"),
        ("no base of an example", r"base: expected ids and gradients for each of 2 examples, got 1"),
        ("a touched row without base", r"base\[0\] ids: expected sorted ids, each once, of all rows"),
        ("unsorted base", r"base\[0\] ids: expected sorted ids"),
        ("narrow base", r"base\[0\] gradient: expected shape \[U, I\] = \[2, 5\], got \[2, 1\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_any_kernel_reads_them(impl, what, message):
    rows, state, base = spoiled(what)
    with pytest.raises(ArgumentError, match=message):
        ops.row_changes(rows, *state, STEP, base=base, impl=impl)


def test_a_base_in_float64_goes_where_float64_is_computed():
    rows, state, base = spoiled("nothing")
    want = ops.row_changes(rows, *state, STEP, base=base, impl="reference")
    wide = [(ids, grad.double()) for ids, grad in base]
    torch.testing.assert_close(ops.row_changes(rows, *state, STEP, base=wide), want, rtol=1e-5, atol=1e-7)
    with pytest.raises(ArgumentError):
        ops.row_changes(rows, *state, STEP, base=wide, impl="cpu")


def test_a_mistyped_instruction_set_is_named(monkeypatch):
    rows, state, base = spoiled("nothing")
    monkeypatch.setenv("MONTESSORI_SIMD", "AVX2")
    with pytest.raises(
        ArgumentError, match=r"^MONTESSORI_SIMD=AVX2: expected one of amx, avx512bf16, avx512, avx2, baseline"
    ):
        ops.row_changes(rows, *state, STEP, base=base)


@every_impl
def test_autograd_learns_that_a_kernel_has_written(impl):
    param, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    product = (param * x).sum()
    ops.adam_step_(param, param, torch.ones(3), torch.ones(3), torch.ones(3), STEP, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    logits = torch.zeros(2, 4, requires_grad=True)
    squares = (logits * logits).sum()
    ops.cross_entropy_(logits, torch.tensor([1, 2]), torch.ones(2), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with torch.inference_mode():
        ops.adam_step_(torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3), STEP, impl=impl)


@every_impl
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_step_of_several_dtypes_is_taken_in_the_widest(impl, narrow):
    grad, param = torch.tensor([1e-3, -2e-3, 0.5]).to(narrow), torch.tensor([1.0, -2.0, 0.25]).to(narrow)
    exp_avg, exp_avg_sq = torch.tensor([1e-4, 1e-4, 1e-2]), torch.tensor([1e-8, 1e-9, 1e-3])
    wide = param.double()
    ops.adam_step_(wide, wide, grad.double(), exp_avg.double(), exp_avg_sq.double(), STEP, impl="reference")
    ops.adam_step_(param, param, grad, exp_avg, exp_avg_sq, STEP, impl=impl)
    # One rounding of the weight, half of a unit in its last place.
    assert ((param.double() - wide).abs() <= 0.51 * torch.finfo(narrow).eps * wide.abs()).all()


@every_impl
def test_a_large_finite_gradient_has_a_finite_score(impl):
    grad, ones = torch.tensor([[1e20, 1.0]]), torch.ones(2)
    step = AdamWStep(lr=1.0, step=100)
    want = ops.adam_influence(grad.double(), ones[None].double(), *[ones.double()] * 3, step, impl="reference")
    got = ops.adam_influence(grad, ones[None], ones, ones, ones, step, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@every_impl
@pytest.mark.parametrize("simd", simd_levels())
@pytest.mark.parametrize("beta2", [0.999, 0.2])
@pytest.mark.parametrize("kind", ["linear", "embedding", "ready", "step"])
def test_second_moments_near_the_largest_float_step_as_in_float64(monkeypatch, impl, simd, beta2, kind):
    """Early, and after gradients of 1e18, v̂ = v'/(1−β2^t) is beyond float32, while Δ is of the usual size."""
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    step = AdamWStep(lr=0.1, beta2=beta2, step=2)
    case = {"linear": linear_case((3, 2), 33, 50, step=step), "embedding": embedding_case((3, 2), 33, 50, step=step)}
    case = case.get(kind) or ready_case((33, 50), size=1, step=step)
    case = replace(case, exp_avg=case.exp_avg * 1e18, exp_avg_sq=case.exp_avg_sq * 1e38).to(torch.float32)
    wide = case.to(torch.float64)
    state = wide.exp_avg, wide.exp_avg_sq, wide.param, step
    if kind == "step":
        got = torch.empty_like(case.param)
        moments = case.exp_avg, case.exp_avg_sq
        ops.adam_step_(got, torch.zeros_like(got), case.ready[0], *moments, step, impl=impl)
        want = sizes = reference.delta(wide.ready[0], *state)
    else:
        got, want = case.run(impl=impl), wide.specified()
        sizes = torch.einsum("k...,...->k", wide.q.abs(), reference.delta(wide.grads()[0], *state).abs())
    # Some 8 roundings of each change; what gradients of size 1 change beside these moments is far below.
    assert torch.all((got - want).abs() <= 8 * torch.finfo(torch.float32).eps * sizes.abs())
    if beta2 > 0.5:
        assert float(case.exp_avg_sq.max()) * beta2 / (1 - beta2**2) > torch.finfo(torch.float32).max
        assert float(want.abs().max()) > 1e-3


@every_impl
def test_targets_may_be_strided(impl):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1], [2, 3], [4, 0]])
    want = ops.cross_entropy_(logits.clone(), labels[:, 1].contiguous(), torch.ones(3), impl=impl)
    got = ops.cross_entropy_(logits.clone(), labels[:, 1], torch.ones(3), impl=impl)
    assert torch.equal(got, want)


def test_long_sums_do_not_depend_on_threads():
    rows = torch.randn(70_000, 1, generator=torch.Generator().manual_seed(0))
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(ops.example_sums(rows, torch.tensor([0, 70_000]), impl="reference"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    assert math.isclose(float(sums[0]), float(rows.double().sum()), rel_tol=1e-4)


@every_impl
def test_the_default_device_of_the_owner_is_not_that_of_offsets(impl):
    rows, state = table()
    x, dy = torch.ones(4, 5), torch.ones(4, 7)
    arguments = (x, dy, rows.offsets, *state, STEP)
    want = ops.linear_influence(*arguments, rows=rows, impl=impl)
    with torch.device("meta"):
        assert torch.equal(ops.linear_influence(*arguments, rows=rows, impl=impl), want)


def test_a_float64_gradient_of_rows_alone_makes_the_arithmetic_so():
    rows, state = table()
    arguments = (torch.ones(4, 5), torch.ones(4, 7), rows.offsets)
    got = ops.linear_influence(*arguments, *state, STEP, rows=changed(rows, grad=rows.grad.double()))
    wide = [tensor.double() for tensor in (*state,)]
    want = ops.linear_influence(*[t.double() if t.is_floating_point() else t for t in arguments], *wide, STEP,
                                rows=changed(rows, grad=rows.grad.double()))  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dampening": float("nan")},
        {"momentum": -0.1},
        {"nesterov": True},
        {"momentum": 0.9, "dampening": 0.5, "nesterov": True},
    ],
)
def test_what_torch_refuses_of_sgd_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"dampening=nan|momentum=-0.1|nesterov=True"):
        SGDStep(lr=0.1, **wrong)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ops.adam_step_(torch.ones(2), None, torch.ones(2), None, None, SGDStep(lr=1.0)), "source"),
        (lambda: ops.cross_entropy_(None, torch.tensor([1]), torch.ones(1)), "logits"),
        (lambda: ops.example_sums(None, torch.tensor([0, 1])), "rows"),
        (lambda: ops.draw_tiles(None, 0.5, 1), "q"),
    ],
)
def test_none_in_the_place_of_a_tensor_is_named(call, name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected a torch.Tensor, got NoneType"):
        call()


@pytest.mark.skipif("cpu" not in ops.available_impls(), reason="no compiled kernels")
@pytest.mark.parametrize("shape", [(0, 5), (7, 0)])
def test_a_sample_of_an_empty_weight_is_0(shape):
    q, param = torch.ones(1, *shape), torch.ones(shape)
    tiles = ops.draw_tiles(q, 0.5, 1)
    x, dy = torch.ones(4, shape[1]), torch.ones(4, shape[0])
    scores, variance = ops.sampled_linear_influence(
        x, dy, torch.tensor([0, 4]), q, param, param, param, STEP, tiles=tiles
    )
    assert scores.tolist() == [[0.0]] and variance.tolist() == [[0.0]]
