"""Models of which autograd does not give the derivative of the loss: two parameters in one memory, DoRA."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
from support import make_model, make_rows, plain_loss, reference_loss, slow_influence, warm_optimizer
from torch import nn

from montessori import InfluenceEstimator
from montessori.errors import CurvatureWarning, FallbackWarning, ModelError
from montessori.referenceset import ReferenceSets

CANDIDATES, REFERENCES = make_rows(4, seed=1), make_rows(3, seed=2)


def alias(model, trained: bool = True) -> None:
    table = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(table.data)
    table.requires_grad_(trained)


def first_column_block(model) -> None:
    """Two layers that hold columns of one matrix: side by side, no value is in both."""
    rows, columns = model.model.layers[0].mlp.gate_proj.weight.shape
    whole = torch.randn(rows, 2 * columns, dtype=torch.float64)
    for layer, part in zip(model.model.layers, whole.split(columns, 1), strict=True):
        layer.mlp.gate_proj.weight = nn.Parameter(part)


def adapters_in_one_memory(model) -> nn.Module:
    targets = ["embed_tokens", "lm_head"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True))


def score(model, method: str):
    return InfluenceEstimator(model, warm_optimizer(model), REFERENCES, method=method).score(CANDIDATES).influence


@pytest.mark.parametrize("method", ["anchored", "first_order"])
@pytest.mark.parametrize("trained", [True, False])
def test_two_parameters_in_one_memory_are_named(method, trained):
    model = make_model("llama_untied")
    alias(model, trained)
    with pytest.raises(ModelError, match=r"lm_head.weight and model.embed_tokens.weight .* method='exact'"):
        score(model, method)


def test_real_steps_take_two_parameters_in_one_memory():
    model = make_model("llama_untied")
    alias(model)
    optimizer = warm_optimizer(model)
    saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    before, want = float(reference_loss(model, REFERENCES).detach()), []
    for row in CANDIDATES:
        plain_loss(model, row).backward()
        optimizer.step()
        want.append(before - float(reference_loss(model, REFERENCES).detach()))
        optimizer.zero_grad()
        model.load_state_dict(saved)
        optimizer.load_state_dict(copy.deepcopy(state))
    got = InfluenceEstimator(model, optimizer, REFERENCES, method="exact").score(CANDIDATES)
    np.testing.assert_allclose(got.influence, want, rtol=1e-9)


def test_a_wider_copy_would_part_them():
    model = make_model("llama_untied", torch.bfloat16)
    alias(model)
    with pytest.raises(ModelError, match="with float32 weights"):
        score(model, "exact")


def test_adapters_that_peft_ties_are_named():
    model = adapters_in_one_memory(make_model("llama_tied"))
    with pytest.raises(ModelError, match=r"lora_embedding_.* two parameters in the same memory"):
        score(model, "anchored")


def test_parts_of_one_matrix_that_do_not_meet_are_scored():
    model = make_model("llama_untied")
    first_column_block(model)
    optimizer = warm_optimizer(model)
    want = slow_influence(model, optimizer, CANDIDATES, REFERENCES, "first_order")
    got = InfluenceEstimator(model, optimizer, REFERENCES, method="first_order").score(CANDIDATES)
    np.testing.assert_allclose(got.influence, want, rtol=1e-9)


def test_a_frozen_pair_in_one_memory_concerns_nobody():
    model = make_model("llama_untied")
    alias(model, trained=False)
    model.lm_head.weight.requires_grad_(False)
    assert np.isfinite(score(model, "first_order")).all()


class Halved(torch.autograd.Function):
    """With a gradient that is not the derivative, as PEFT's C3A has one."""

    @staticmethod
    def forward(ctx, x):
        return 0.5 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def wrong_backward(x: torch.Tensor) -> torch.Tensor:
    return Halved.apply(x)


def part_of_the_way_hidden(x: torch.Tensor) -> torch.Tensor:
    return x - 0.5 * x.detach()


def warnings_of(model, monkeypatch, **settings) -> tuple[list[str], int]:
    """Texts of its curvature warnings, and how often the reference loss is taken for them and for the anchor."""
    optimizer, taken, loss = warm_optimizer(model), [], ReferenceSets.loss
    weights = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(ReferenceSets, "loss", lambda *arguments, **kw: taken.append(0) or loss(*arguments, **kw))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        InfluenceEstimator(model, optimizer, REFERENCES, **settings).score(CANDIDATES)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    return [str(one.message) for one in caught if one.category is CurvatureWarning], len(taken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lr", [1e-3, 3e-3])
@pytest.mark.parametrize("spoil", [wrong_backward, part_of_the_way_hidden])
def test_a_gradient_that_is_not_the_derivative_is_told_from_a_large_step(spoil, lr, dtype, monkeypatch):
    model = make_model("llama_untied", dtype)
    model.lm_head.weight.requires_grad_(False)
    for layer in model.model.layers:
        # All that reaches the loss comes by here: gradients are 2 or 4 times the derivative.
        layer.forward = lambda *arguments, inner=layer.forward, **settings: spoil(inner(*arguments, **settings))
    (text,), _ = warnings_of(model, monkeypatch, lr=lr)
    assert "however short the step: autograd's gradient is not the derivative" in text and "\n" not in text


@pytest.mark.parametrize(("name", "lr"), [("gpt2", 0.1), ("gemma2", 1.0), ("mamba", 1.0)])
def test_a_step_however_large_is_not_taken_for_a_wrong_gradient(name, lr, monkeypatch):
    (text,), _ = warnings_of(make_model(name), monkeypatch, lr=lr)
    assert "a step this large is not linear" in text


def test_a_step_that_is_linear_takes_no_further_loss(monkeypatch):
    assert warnings_of(make_model("llama_untied"), monkeypatch, lr=1e-5) == ([], 1)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "o_proj"]])
def test_the_norm_that_dora_holds_constant_is_differentiated_for_the_reference(targets):
    """Without it influences are 10 to 18 % of their spread off, at any learning rate."""
    config = peft.LoraConfig(r=2, target_modules=targets, use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama_untied"), config).double()
    optimizer = warm_optimizer(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    want = InfluenceEstimator(model, optimizer, REFERENCES, method="exact").score(CANDIDATES).influence
    for method in ("anchored", "first_order"):
        estimator = InfluenceEstimator(model, optimizer, REFERENCES, method=method)
        assert np.abs(estimator.score(CANDIDATES).influence - want).max() < 0.01 * np.ptp(want)
        # Its magnitudes are divided by that norm, which is no example's own.
        assert "autograd" not in estimator.coverage
    longest = max(len(row["input_ids"]) for row in CANDIDATES)
    one_by_one = estimator.score(CANDIDATES, batch_tokens=longest).influence
    np.testing.assert_allclose(estimator.score(CANDIDATES).influence, one_by_one, rtol=1e-9)
    assert [vars(module).get("forward") for module in model.modules()] == forwards


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_adapters_that_put_their_base_weight_aside_and_back_are_scored(name):
    """PEFT exchanges a stack of experts for a parametrized one in every forward pass; nothing that is trained moves."""
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks, init_lora_weights=False)
    model = peft.get_peft_model(make_model(name), config).double()
    optimizer = warm_optimizer(model, lr=1e-4)
    want = slow_influence(model, optimizer, CANDIDATES, REFERENCES, "first_order")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        estimator = InfluenceEstimator(model, optimizer, REFERENCES, method="first_order")
        np.testing.assert_allclose(estimator.score(CANDIDATES).influence, want, rtol=1e-9)
    assert estimator.coverage.keys() == {"linear", "experts"}
    want, got = (
        InfluenceEstimator(model, optimizer, REFERENCES, method=method, max_grad_norm=0.1).score(CANDIDATES).influence
        for method in ("exact", "anchored")
    )
    np.testing.assert_allclose(got, want, atol=0.02 * np.ptp(want))


@pytest.mark.parametrize("method", ["anchored", "first_order"])
def test_the_row_of_padding_is_differentiated_for_the_reference(method):
    """A look-up gives it no gradient, but a tied head moves it; where padding ends every turn, all rows hold it."""
    model = make_model("gpt2")
    model.transformer.wte.padding_idx = 7
    candidates, references = ([end_with(row, 7) for row in rows] for rows in (CANDIDATES, REFERENCES))
    optimizer = warm_optimizer(model)
    want, got = (
        InfluenceEstimator(model, optimizer, references, method=one, lr=1e-7).score(candidates).influence
        for one in ("exact", method)
    )
    np.testing.assert_allclose(got, want, atol=1e-4 * np.ptp(want))
    assert model.transformer.wte.padding_idx == 7


def end_with(row: dict[str, list[int]], token: int) -> dict[str, list[int]]:
    return {key: [*ids[:1], token, *ids[1:], token] for key, ids in row.items()}
