"""Live optimizers: several side by side, and steps that are more than Eq. 1."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from state_support import take_steps, tiny_llama
from support import make_model, make_rows, plain_loss, reference_loss, warm_optimizer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from montessori import AdamWState, InfluenceEstimator
from montessori.checkpoints import read_state
from montessori.errors import StateError


class Several:
    """What steps several optimizers at once, for a loop that has one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [torch.optim.AdamW(matrices, lr=1e-5), torch.optim.SGD(vectors, lr=1e-3, momentum=0.9)]


def test_several_optimizers_are_one_step():
    model = make_model("llama_tied")
    parts = two_optimizers(model)
    take_steps(model, Several(*parts))
    candidates, references = make_rows(3, seed=1), make_rows(3, seed=2)
    got = InfluenceEstimator(model, parts, references, method="exact").score(candidates).influence
    close = InfluenceEstimator(model, parts, references).score(candidates).influence
    want = []
    for row in candidates:
        stepped, its_parts = copy.deepcopy((model, parts))
        before = reference_loss(stepped, references).item()
        plain_loss(stepped, row).backward()
        Several(*its_parts).step()
        want.append(before - reference_loss(stepped, references).item())
    np.testing.assert_allclose(got, want, rtol=1e-7)
    np.testing.assert_allclose(close, got, atol=0.02 * np.ptp(got))


def test_a_parameter_in_two_optimizers_is_refused():
    model = tiny_llama()
    parts = [torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.lm_head.parameters())]
    with pytest.raises(StateError, match="one parameter in two"):
        AdamWState.from_optimizer(model, parts)


def test_a_head_that_is_stepped_beside_the_model_takes_no_part():
    model = make_model("llama_tied")
    alone = AdamWState.from_optimizer(model, warm_optimizer(model))
    beside = torch.optim.AdamW([*model.parameters(), *nn.Linear(4, 1).parameters()], lr=1e-3)
    take_steps(model, beside)
    assert AdamWState.from_optimizer(model, beside).keys() == alone.keys()


@pytest.mark.parametrize("make", [
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
])  # fmt: skip
def test_what_holds_an_optimizer_is_told_apart(make):
    model = tiny_llama()
    with pytest.raises(StateError, match=r"expected an optimizer, got a LambdaLR: pass its .optimizer"):
        AdamWState.from_optimizer(model, make(torch.optim.AdamW(model.parameters())))


def no_change(*_: object) -> None:
    return None


def test_an_optimizer_whose_step_begins_with_a_hook_is_refused():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = optimizer.register_step_pre_hook(no_change)
    with pytest.raises(StateError, match="register_step_pre_hook"):
        AdamWState.from_optimizer(model, optimizer)
    handle.remove()
    assert AdamWState.from_optimizer(model, optimizer)


def test_hooks_for_all_optimizers_are_refused_as_their_own():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = register_optimizer_step_pre_hook(no_change)
    try:
        with pytest.raises(StateError, match="expected no hooks that run before its step"):
            AdamWState.from_optimizer(model, optimizer)
    finally:
        handle.remove()


@pytest.mark.parametrize("of_all", [False, True])
def test_hooks_that_are_registered_between_two_calls_are_seen(of_all):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    estimator, candidates = InfluenceEstimator(model, optimizer, make_rows(2, seed=2)), make_rows(2, seed=1)
    want = estimator.score(candidates).influence
    handle = (register_optimizer_step_pre_hook if of_all else optimizer.register_step_pre_hook)(no_change)
    try:
        for _ in range(2):
            with pytest.raises(StateError, match="expected no hooks that run before its step"):
                estimator.score(candidates)
    finally:
        handle.remove()
    np.testing.assert_array_equal(estimator.score(candidates).influence, want)
    handle = (register_optimizer_step_post_hook if of_all else optimizer.register_step_post_hook)(no_change)
    try:
        with pytest.warns(UserWarning, match="scores are of the step of torch.optim.AdamW alone"):
            estimator.score(candidates)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["own hook", "hook of all", "replaced"])
def test_what_runs_after_the_step_is_warned_of(kind):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    if kind == "replaced":
        step = optimizer.step
        optimizer.step = lambda: step()
    registered = register_optimizer_step_post_hook
    handle = None if kind == "replaced" else (
        optimizer.register_step_post_hook(no_change) if kind == "own hook" else registered(no_change)
    )  # fmt: skip
    try:
        with pytest.warns(UserWarning, match="scores are of the step of torch.optim.AdamW alone"):
            AdamWState.from_optimizer(model, optimizer)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("kind", ["scheduler", "compiled"])
def test_a_step_that_is_only_wrapped_is_its_own(kind):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    if kind == "scheduler":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    else:
        optimizer.step = torch.compile(optimizer.step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamWState.from_optimizer(model, optimizer)


@pytest.mark.parametrize("option", [{"bias_correction": False}, {"caution": True}, {"trust_coeff": 0.001}])
def test_a_file_of_another_optimizer_is_told_by_its_options(tmp_path, option):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    take_steps(model, optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"bias_correction": True, "caution": False, "initial_lr": 1e-3}
    torch.save(saved, tmp_path / "optimizer.pt")
    assert read_state(tmp_path, model)
    saved["param_groups"][0] |= option
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(StateError, match=f"param group has {next(iter(option))}="):
        read_state(tmp_path, model)


@pytest.mark.parametrize("method", ["anchored", "exact"])
def test_a_drift_that_is_not_finite_is_told_and_spares_the_scores(method):
    model = make_model("gpt2")
    # Rows of tables that no example touches would have 0 / 0 in the candidates' steps too.
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    optimizer = warm_optimizer(model)
    for group in optimizer.param_groups:
        group["eps"] = 0.0
    for part in optimizer.state[model.transformer.h[0].mlp.c_fc.bias].values():
        part.zero_() if part.dim() else None
    estimator = InfluenceEstimator(model, optimizer, make_rows(2, seed=2), method=method)
    with pytest.warns(UserWarning, match="the step without a gradient is not finite"):
        scores = estimator.score(make_rows(3, seed=1))
    assert np.isfinite(scores.influence).all() and np.isnan(scores.drift) and np.isnan(scores.centred).all()
