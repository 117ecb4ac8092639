"""`montessori.ops` against the specification in float64, on ragged and hostile shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases import (
    ADAMW,
    HOSTILE,
    STEPS,
    SUMS,
    Case,
    assert_specified,
    assert_step_specified,
    assert_sums_specified,
    bounds,
    every_impl,
    every_step,
    hostile,
    linear_case,
    make_state,
    ready_case,
)
from torch import Tensor

from montessori import blocked, ops
from montessori.errors import ArgumentError
from montessori.ops import SparseRows


@every_impl
@every_step
@pytest.mark.parametrize("shape", [(3, 1700), (1,), (17,), (4096,), (0,), (2, 3, 5)], ids=str)
def test_the_step_itself_is_as_specified(shape, step, impl):
    assert_step_specified(shape, step, torch.float32, impl)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_sums_over_the_rows_of_examples_are_as_specified(name, dtype):
    assert_sums_specified(name, dtype, "auto")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": torch.ones(3, 3)}, r"times: expected shape rows.shape = \[3, 2\], got \[3, 3\]"),
        ({"scale": torch.ones(2)}, r"scale: expected shape \[N\] = \[3\], got \[2\]"),
        ({"rows": torch.ones(3, 2).long()}, "rows: expected dtype"),
        ({"offsets": torch.tensor([0, 2])}, "offsets: expected to run from 0 to 3"),
        ({"impl": "triton"}, "impl='triton'"),
    ],
)
def test_rows_that_cannot_be_summed_are_named(change, words):
    arguments = {"rows": torch.ones(3, 2), "offsets": torch.tensor([0, 3])} | change
    with pytest.raises(ArgumentError, match=words):
        ops.example_sums(**arguments)


@pytest.mark.skipif("cpu" not in ops.available_impls(), reason="the CPU kernels are not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_of_narrow_weights_is_rounded_once(dtype):
    assert_step_specified((3, 1700), ADAMW, dtype, "cpu")


def test_a_step_that_does_not_fit_is_refused():
    case = ready_case((4, 3), size=1)
    state = (case.exp_avg, case.exp_avg_sq, ADAMW)
    with pytest.raises(ArgumentError, match=r"grad: expected shape .*\[4, 3\], got \[3, 4\]"):
        ops.adam_step_(case.param, case.param, case.ready[0].T, *state)
    with pytest.raises(ArgumentError, match=r"param: expected shape .*\[4, 3\], got \[4\]"):
        ops.adam_step_(case.param[:, 0], case.param, case.ready[0], *state)
    with pytest.raises(ArgumentError, match=r"source: expected torch.float64, as param, got torch.float32"):
        ops.adam_step_(case.param, case.param.float(), case.ready[0], *state)


def test_a_strided_weight_steps_in_place():
    case = ready_case((4, 3), size=1)
    want, column = case.param.clone(), torch.zeros(3, 4, dtype=case.param.dtype).T
    ops.adam_step_(want, case.param, case.ready[0], case.exp_avg, case.exp_avg_sq, ADAMW)
    ops.adam_step_(column, case.param, case.ready[0], case.exp_avg, case.exp_avg_sq, ADAMW)
    assert torch.equal(column, want)


@every_impl
@hostile
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_as_specified(case, dtype, impl):
    assert_specified(case, dtype, impl)


@every_impl
@every_step
@pytest.mark.parametrize("name", ["ordinary", "tied", "table", "matrix", "all_empty"])
def test_scores_of_every_optimizer_are_as_specified(name, step, impl):
    case = HOSTILE[name]
    case = replace(case, **make_state(tuple(case.param.shape), len(case.q), step))
    assert_specified(case, torch.float64, impl)
    assert_specified(case, torch.float32, impl)


@pytest.mark.parametrize("name", ["ordinary", "table", "matrix"])
def test_a_momentum_buffer_is_not_used_at_the_first_step(name):
    case = HOSTILE[name]
    case = replace(case, **make_state(tuple(case.param.shape), len(case.q), STEPS["sgd_first_step"]))
    assert torch.equal(case.run(), replace(case, exp_avg=None).run())
    later = replace(case, step=replace(case.step, step=2))
    assert not torch.allclose(case.run(), later.run())


@hostile
@pytest.mark.parametrize("elements", [1, 4, 7])
def test_scores_do_not_depend_on_the_size_of_a_block(monkeypatch, case, elements):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
    if len(case.grads()) > 100:
        case = replace(case, x=case.x[:50], dy=case.dy[:50], offsets=case.offsets[:51])
    # A block belongs to this implementation.
    assert_specified(case, torch.float64, "reference")
    assert_specified(case, torch.float32, "reference")


@pytest.mark.parametrize("name", ["ordinary", "empty_in_the_middle", "tied", "table", "matrix"])
def test_scores_do_not_depend_on_what_shares_the_call(name):
    case = HOSTILE[name]
    parts = torch.cat([split(case, 0, 1).run(), split(case, 1, None).run()])
    assert torch.all((parts - case.run()).abs() <= case.allowed(torch.float64))


def split(case: Case, start: int, stop: int | None) -> Case:
    """The examples start..stop of a case alone."""

    def part(offsets: Tensor) -> tuple[slice, Tensor]:
        kept = offsets[start : None if stop is None else stop + 1]
        return slice(int(kept[0]), int(kept[-1])), kept - kept[0]

    changes: dict = {}
    if case.ready is not None:
        changes["ready"] = case.ready[start:stop]
    if case.x is not None:
        span, offsets = part(case.offsets)
        changes |= {"x": case.x[span], "dy": case.dy[span], "offsets": offsets}
    if case.rows is not None:
        span, offsets = part(case.rows.offsets)
        changes["rows"] = SparseRows(case.rows.ids[span], case.rows.grad[span], offsets)
    return replace(case, **changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["ordinary", "tied", "table", "matrix"])
def test_a_broken_example_breaks_its_own_score_alone(name, value):
    case, position = HOSTILE[name], 0
    want = case.run()
    broken = case.to(torch.float64)
    tensors = {"ordinary": broken.dy, "tied": broken.rows and broken.rows.grad, "matrix": broken.ready}
    tensor = tensors.get(name, broken.rows and broken.rows.grad).clone()
    tensor[0] = value
    if name in ("tied", "table"):
        broken = replace(broken, rows=replace(broken.rows, grad=tensor))
    else:
        broken = replace(broken, **{"dy" if name == "ordinary" else "ready": tensor})
    got = broken.run()
    # An infinite gradient gives Inf / Inf = NaN in Eq. 1, as in torch.
    assert got[position].isnan().all()
    assert torch.equal(got[1:], want[1:])
    assert want.isfinite().all()


def test_a_given_drift_takes_the_place_of_the_computed_one():
    case = HOSTILE["table"]
    zero = ops.adam_influence(torch.zeros(1, *case.param.shape), *case.state)[0]
    assert torch.equal(case.run(drift=zero), case.run())
    torch.testing.assert_close(case.run(drift=zero + 5), case.run() + 5, rtol=1e-13, atol=1e-13)


def test_inputs_are_left_alone_and_may_require_grad():
    for case in (HOSTILE["tied"], HOSTILE["table"], HOSTILE["matrix"]):
        case = replace(case, param=torch.nn.Parameter(case.param), step=STEPS["adam_l2"])
        floating = {name: value for name, value in vars(case).items() if isinstance(value, Tensor)}
        before = {name: value.detach().clone() for name, value in floating.items()}
        assert not case.run().requires_grad
        assert all(torch.equal(value, before[name]) for name, value in floating.items())


def test_strided_views_score_like_their_copies():
    case = linear_case((3, 2))
    view = replace(
        case,
        **{name: getattr(case, name).T.contiguous().T for name in ("x", "dy", "param", "exp_avg", "exp_avg_sq")},
        q=torch.stack([case.q, case.q])[::2][0],
    )
    assert torch.all((view.run() - case.run()).abs() <= case.allowed(torch.float64))


# Bad input


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


RAGGED = {
    "x_dtype": (lambda c: replace(c, x=c.x.long()), "x: expected dtype float64, .*got torch.int64"),
    "q_dtype": (lambda c: replace(c, q=c.q > 0), "q: expected dtype .*got torch.bool"),
    "x_type": (lambda c: replace(c, x=[1.0]), "x: expected a torch.Tensor.*got list"),
    "q_none": (lambda c: replace(c, q=None), "q: expected a torch.Tensor.*got NoneType"),
    "dy_none": (lambda c: replace(c, dy=None), "dy: expected a torch.Tensor.*got NoneType"),
    "param_none": (lambda c: replace(c, param=None), "param: expected a torch.Tensor, got NoneType"),
    "x_device": (lambda c: replace(c, x=meta(c.x)), "x: expected device cpu, got meta"),
    "moment_device": (lambda c: replace(c, exp_avg=meta(c.exp_avg)), "exp_avg: expected device cpu, got meta"),
    "sparse": (lambda c: replace(c, dy=c.dy.to_sparse()), "dy: expected a dense tensor, got layout torch.sparse_coo"),
    "x_width": (lambda c: replace(c, x=c.x[:, :2]), r"x: expected shape \[T, I\] = \[any, 3\], got \[9, 2\]"),
    "dy_rows": (lambda c: replace(c, dy=c.dy[1:]), r"dy: expected shape \[T, O\] = \[9, 5\], got \[8, 5\]"),
    "x_padded": (lambda c: replace(c, x=c.x[None]), r"x: expected shape \[T, I\] .* got \[1, 9, 3\]"),
    "q_without_sets": (lambda c: replace(c, q=c.q[0]), r"q: expected shape .* = \[any, 5, 3\], got \[5, 3\]"),
    "moment_shape": (lambda c: replace(c, exp_avg=c.exp_avg.T), r"exp_avg: expected shape .*\[5, 3\], got \[3, 5\]"),
    "vector_param": (
        lambda c: replace(c, **make_state((5,), 2, ADAMW)),
        r"param: expected shape \[O, I\] .*got \[5\]",
    ),
    "no_moment": (lambda c: replace(c, exp_avg=None), "exp_avg: expected a tensor for AdamWStep.*, got None"),
    "no_second": (lambda c: replace(c, exp_avg_sq=None), "exp_avg_sq: expected a tensor for AdamWStep.*, got None"),
    "no_buffer": (
        lambda c: replace(c, exp_avg=None, step=STEPS["sgd_momentum"]),
        "exp_avg: expected a tensor for SGDStep.*, got None",
    ),
    "step_type": (lambda c: replace(c, step=0.1), "step: expected AdamWStep or SGDStep, got float"),
    "unsorted": (
        lambda c: replace(c, offsets=torch.tensor([0, 5, 4, 9])),
        "offsets: expected sorted offsets, got 5 then 4 at example 1",
    ),
    "not_all_rows": (lambda c: replace(c, offsets=bounds(3, 2)), "offsets: expected to run from 0 to 9 .*got 0 to 5"),
    "late_start": (lambda c: replace(c, offsets=bounds(3, 6)[1:]), "offsets: expected to run from 0 to 9.*got 3 to 9"),
    "no_offsets": (lambda c: replace(c, offsets=bounds()[1:]), "offsets: expected to run from 0 to 9.*got no entry"),
    "offset_dtype": (lambda c: replace(c, offsets=c.offsets.int()), r"expected an int64 tensor \[B\+1\], got .*int32"),
    "offset_list": (lambda c: replace(c, offsets=[0, 9]), r"offsets: expected an int64 tensor \[B\+1\], got list"),
    "rows_type": (lambda c: replace(c, rows=(1, 2)), "rows: expected SparseRows, got tuple"),
    "row_ids": (
        lambda c: replace(c, rows=replace(c.rows, ids=c.rows.ids + 5)),
        r"rows.ids: expected ids in 0..4, got \d+..\d+",
    ),
    "row_ids_dtype": (
        lambda c: replace(c, rows=replace(c.rows, ids=c.rows.ids.int())),
        r"rows.ids: expected an int64 tensor \[T\], got torch.int32",
    ),
    "row_ids_device": (
        lambda c: replace(c, rows=replace(c.rows, ids=meta(c.rows.ids))),
        "rows.ids: expected device cpu, got meta",
    ),
    "row_examples": (
        lambda c: replace(c, rows=replace(c.rows, offsets=bounds(15))),
        r"rows.offsets: expected shape \[B\+1\], as offsets = \[4\], got \[2\]",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), RAGGED.values(), ids=RAGGED)
def test_an_argument_that_does_not_fit_says_what_was_expected_and_what_came(spoil, message):
    with pytest.raises(ArgumentError, match=message):
        spoil(linear_case((3, 2, 4), tied=(5, 1, 9))).run()


def test_ready_gradients_and_drifts_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentError, match=r"grad: expected shape .* = \[any, 3, 5\], got \[3, 5\]"):
        replace(HOSTILE["matrix"], ready=HOSTILE["matrix"].ready[0]).run()
    for drift, got in ((torch.zeros(3), r"\[3\]"), (0.0, "float"), (torch.zeros(2), "torch.float32")):
        with pytest.raises(ArgumentError, match=f"drift: expected .*, got {got}"):
            HOSTILE["table"].run(drift=drift)


@pytest.mark.parametrize("name", ["ordinary", "table", "matrix"])
def test_an_implementation_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ArgumentError, match=r"impl='abacus': expected 'auto' or .*reference"):
        HOSTILE[name].run(impl="abacus")
    for impl in ("auto", "reference"):
        torch.testing.assert_close(HOSTILE[name].run(impl=impl), HOSTILE[name].run(impl="reference"))
