"""Whether `montessori.trial` calls wrong kernels wrong, and right ones right."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from montessori import ops, reference, trial

DTYPES = {"operands": (*trial.NARROW, torch.float32), "states": trial.HELD, "device": "cpu"}


def kernel(x, dy, spans, q, exp_avg, exp_avg_sq, param, step, rows, fault=None):
    """Scores in float32, with one fault."""
    if fault == "another epsilon":
        step = replace(step, eps=trial.STEP.eps)
    scores = []
    for low, high in spans:
        last = high + 1 if fault == "padding is read" and high < len(x) else high
        grad = dy[low:last].float().T @ x[low:last].float()
        if fault == "what is not a number spreads":
            grad = grad + 0 * dy.float().sum()
        delta = reference.delta(grad, exp_avg.float(), exp_avg_sq.float(), param, step)
        if fault == "a corner is left out":
            delta[-8:, -8:] = 0
        if fault == "one element is left out":
            delta.flatten()[delta.abs().argmax()] = 0
        if fault == "no moments are 0 by 0":
            delta = delta / (exp_avg_sq != 0) * (exp_avg_sq != 0)
        scores.append((q.float() * delta).double().sum((1, 2)))
    scores = torch.stack(scores)
    if fault == "the next example is taken":
        scores = scores.roll(-1, 0)
    return scores + torch.rand_like(scores) * 1e-9 if fault == "other bits each time" else scores


@pytest.mark.parametrize("settings", [{}, {"sets": 3}])
def test_a_right_kernel_passes(settings):
    rows = trial.check(kernel, **DTYPES, **settings)
    assert len(rows) == len(trial.CHECKED) * 6
    assert trial.failures(rows) == []


@pytest.mark.parametrize("settings", [{}, {"sets": 2}, {"tied": True}])
def test_the_package_s_own_pass(settings):
    def run(x, dy, spans, q, exp_avg, exp_avg_sq, param, step, rows):
        bounds = torch.tensor(spans).reshape(-1, 2)
        offsets = torch.cat([bounds.new_zeros(1), bounds.diff(dim=1).flatten().cumsum(0)])
        return ops.linear_influence(x, dy, offsets, q, exp_avg, exp_avg_sq, param, step, rows=rows, starts=bounds[:, 0])

    assert trial.failures(trial.check(run, **DTYPES, **settings)) == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("another epsilon", "right"),
        ("a corner is left out", "right"),
        ("one element is left out", "right"),
        ("no moments are 0 by 0", "right"),
        ("other bits each time", "repeats"),
    ],
)
def test_every_fault_of_a_tile_is_seen_in_every_case(fault, told):
    rows = trial.check(partial(kernel, fault=fault), **DTYPES)
    assert not any(row[told] for row in rows)


@pytest.mark.parametrize("fault", [None, "a corner is left out", "the next example is taken"])
def test_of_what_is_timed_some_examples_are_checked(fault):
    p = trial.make_problem((96, 72), (5, 1, 64, 30, 17), device="cpu")
    assert trial.spot_check(partial(kernel, fault=fault), p)["right"] == (fault is None)


def test_a_device_gets_more_than_a_processor():
    assert trial.cases("cuda") == (*trial.cases("cpu"), trial.CROWDED)


@pytest.mark.parametrize(
    ("fault", "told", "cases"),
    [
        ("padding is read", "right", [case for case in trial.CHECKED if case[-1]]),
        ("padding is read", "apart", trial.CHECKED[1:]),
        ("what is not a number spreads", "apart", trial.CHECKED[1:]),
        ("the next example is taken", "right", trial.CHECKED[1:]),
    ],
)
def test_every_fault_between_examples_is_seen_where_there_are_several(fault, told, cases):
    rows = trial.check(partial(kernel, fault=fault), **DTYPES)
    seen = {(row["O"], row["I"]) for row in rows if not row[told]}
    assert seen >= {case[:2] for case in cases}
