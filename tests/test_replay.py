"""Small parameters whose calls are run again for each example, on models that use them in ways of their own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capturing import (
    EXAMPLES,
    VOCABULARY,
    WIDTH,
    Collect,
    Model,
    assert_captured_in_batches,
    assert_exact,
    build,
    example,
    mean_loss,
)
from support import make_model, make_rows, warm_optimizer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from montessori import InfluenceEstimator, replay, rules
from montessori.batching import collate
from montessori.capture import Capture
from montessori.coverage import verified_plan
from montessori.errors import FallbackWarning, ModelError


class Sinks(nn.Module):
    """One value per head beside the logits of attention, as GPT-OSS has it."""

    def __init__(self):
        super().__init__()
        self.sinks, self.project = nn.Parameter(torch.zeros(3)), nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        size, length, _ = h.shape
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(size, -1, length, -1)
        logits = torch.cat([self.project(h).view(size, length, 3, 2).transpose(1, 2), sinks], -1)
        return logits.softmax(-1)[..., :-1].transpose(1, 2).flatten(2)


class Gain(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))

    def forward(self, x, gate=None):
        return x * self.gain * (1 if gate is None else torch.sigmoid(gate))


class TiedByHand(Model):
    def __init__(self):
        super().__init__()
        del self.head

    def forward(self, ids):
        return F.linear(torch.tanh(self.middle(self.embed(ids))), self.embed.weight)


class Convolved(nn.Conv1d):
    """Looks back two tokens."""

    def forward(self, x):
        return super().forward(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Decay(nn.Module):
    """What linear attention does with its small parameters: chains of them meet activations, a kernel meets a scan."""

    def __init__(self):
        super().__init__()
        self.log, self.shift = nn.Parameter(torch.zeros(WIDTH, 2)), nn.Parameter(torch.zeros(WIDTH))
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, h):
        rows = F.pad(h.transpose(1, 2), (2, 0))
        mixed = F.conv1d(rows, self.kernel.weight.squeeze(1).unsqueeze(1), bias=self.kernel.bias, groups=WIDTH)
        decay = -self.log.double().exp()[None, :, None, :] * F.softplus(mixed + self.shift[:, None]).unsqueeze(-1)
        first, second = torch.chunk(self.log + self.shift[:, None], 2, dim=1)
        return decay.exp().sum(-1).transpose(1, 2) * (first * second).view(-1) + h


class Stretched(Gain):
    """Its vector is expanded to one copy for each position, of which there may be as many as examples."""

    def forward(self, x):
        return x * self.gain[None].expand(x.shape[1], -1)


class Mirror(nn.Module):
    """A matrix made of a vector, as PEFT's HRA makes its own."""

    def __init__(self):
        super().__init__()
        self.axis = nn.Parameter(torch.ones(1, WIDTH))

    def forward(self, x):
        return x @ (torch.eye(WIDTH, dtype=x.dtype) - 0.1 * (self.axis.T @ self.axis))


class TrainedTokens(Model):
    """Rows of a tied table that else stays as it is, as PEFT's `trainable_token_indices` trains them."""

    def __init__(self):
        super().__init__()
        del self.head
        self.embed.weight.requires_grad_(False)
        self.tokens = nn.Parameter(torch.zeros(3, WIDTH))

    def forward(self, ids):
        table = self.embed.weight
        table = table.index_copy(dim=0, index=torch.tensor([1, 4, 6]), source=self.tokens.to(table))
        return F.linear(torch.tanh(self.middle(F.embedding(ids, table, padding_idx=4))), table)


REPLAYED = {
    "attention_sinks": lambda: Model(middle=Sinks()),
    "scalar_parameter": lambda: Model(middle=Gain()),
    "matrix_of_its_own": lambda: Model(middle=Gain(1, WIDTH)),
    "two_inputs": lambda: Model(lambda m, h, ids: m.middle(h, h.flip(-1)), Gain(WIDTH)),
    "convolution": lambda: Model(middle=Convolved(WIDTH, WIDTH, 3)),
    "decay_and_kernel": lambda: Model(middle=Decay()),
    "expanded_to_positions": lambda: Model(middle=Stretched(WIDTH)),
    "weight_used_behind_its_modules_back": lambda: Model(lambda m, h, ids: m.middle(h) @ m.middle.weight),
    "head_tied_by_hand": TiedByHand,
    "matrix_of_a_vector": lambda: Model(middle=Mirror()),
    "trained_tokens": TrainedTokens,
    "weight_norm": lambda: Model(middle=weight_norm(nn.Linear(WIDTH, WIDTH))),
}


@pytest.mark.parametrize("make", REPLAYED.values(), ids=REPLAYED)
def test_replayed_gradients_are_autograds(make):
    assert assert_captured_in_batches(build(make))["replayed"] > 0


@pytest.mark.parametrize(("most", "left"), [(WIDTH, set()), (WIDTH - 1, {"middle.gain"})])
def test_a_gradient_for_each_example_is_held_of_small_parameters_only(monkeypatch, most, left):
    monkeypatch.setattr(rules, "MOST_VALUES", most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        plan = verified_plan(build(REPLAYED["matrix_of_its_own"]), EXAMPLES[:2], mean_loss)
    assert plan.fallback == left


@pytest.mark.parametrize(("small", "left"), [(WIDTH**2, set()), (WIDTH**2 - 1, {"middle.axis"})])
def test_a_matrix_made_of_a_few_values_is_held_for_each_example_where_it_is_small(monkeypatch, small, left):
    monkeypatch.setattr(replay, "SMALL_FORM", small)
    model = build(REPLAYED["matrix_of_a_vector"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        plan = verified_plan(model, EXAMPLES[:2], mean_loss)
    assert plan.fallback == left
    assert_exact(model, plan, EXAMPLES)


@pytest.mark.parametrize("name", sorted(REPLAYED.keys() - {"matrix_of_a_vector"}))
def test_forms_of_about_the_size_of_their_parameters_are_held_whatever_that_is(monkeypatch, name):
    monkeypatch.setattr(replay, "SMALL_FORM", 0)
    assert not verified_plan(build(REPLAYED[name]), EXAMPLES[:2], mean_loss).fallback


def test_what_a_pass_holds_is_counted_once():
    """The outer product, its multiple and the difference; a copy of the vector is a view for each example."""
    plan = verified_plan(build(REPLAYED["matrix_of_a_vector"]), EXAMPLES[:2], mean_loss)
    assert plan.held == 3 * WIDTH**2 * torch.float64.itemsize
    assert verified_plan(build(REPLAYED["expanded_to_positions"]), EXAMPLES[:2], mean_loss).held == 0


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 6), (3.5, [3, 3]), (6, [6])])
def test_a_pass_takes_no_more_examples_than_what_is_held_of_them_allows(monkeypatch, most, sizes):
    model = make_model("mamba")
    optimizer, rows = warm_optimizer(model), make_rows(6, seed=1)
    found = InfluenceEstimator(model, optimizer, make_rows(3, seed=2))
    want, taken, run = found.score(rows), [], Capture.run
    monkeypatch.setattr(rules, "MOST_HELD", int(most * found._proofs.plan().held))
    monkeypatch.setattr(Capture, "run", lambda self, batch, *rest: taken.append(batch.size) or run(self, batch, *rest))
    # Two orders of summation in float64 over some 10^4 terms.
    np.testing.assert_allclose(found.score(rows).influence, want.influence, rtol=1e-9)
    assert taken == sizes


def test_a_plan_with_a_fallback_keeps_the_other_rules_and_takes_one_example_at_a_time(monkeypatch):
    monkeypatch.setattr(rules, "MOST_VALUES", 1)
    model = build(REPLAYED["matrix_of_its_own"])
    with pytest.warns(FallbackWarning, match=r"middle\.gain: no capture rule holds for 1 parameter"):
        plan = verified_plan(model, EXAMPLES[:2], mean_loss)
    assert plan.fallback == {"middle.gain"}
    assert plan.coverage() == {"autograd": WIDTH, "embedding": VOCABULARY * WIDTH, "linear": VOCABULARY * WIDTH}
    capture = Capture(model, plan)
    with capture.installed(), pytest.raises(ModelError, match="one example at a time, got a batch of 4"):
        capture.run(collate(EXAMPLES), mean_loss, Collect())


@pytest.mark.parametrize("length", [2, 3, 4])
def test_as_many_positions_as_examples_are_not_taken_for_examples(length):
    model = build(REPLAYED["expanded_to_positions"])
    plan = verified_plan(model, EXAMPLES[:2], mean_loss)
    assert plan.coverage()["replayed"] == WIDTH
    assert_exact(model, plan, [example([1 + i, 7, 2, 5][:length], i) for i in range(3)])
