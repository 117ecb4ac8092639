"""A state that was read from an optimizer which then goes on: refused, while the optimizer itself is followed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import make_model, make_rows, plain_loss, slow_influence

from montessori import AdamWState, InfluenceEstimator
from montessori.errors import StateError

CANDIDATES, REFERENCES = make_rows(3, seed=1), make_rows(2, seed=2)
GONE_ON = r"its optimizer has written or replaced moments since it was read.*read it again .*or pass the optimizer"
KINDS = {
    "adamw": (torch.optim.AdamW, {}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


def train(model, optimizer, count, seed=9):
    for row in make_rows(count, seed=seed):
        plain_loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad()


def started(kind="adamw", steps=2):
    made, options = KINDS[kind]
    model = make_model("gpt2")
    optimizer = made(model.parameters(), lr=1e-3, **options)
    train(model, optimizer, steps)
    return model, optimizer


def estimator(model, state, method="exact"):
    return InfluenceEstimator(model, state, REFERENCES, method, pilot=3)


# SGD's first step has no buffer yet, so that nothing of its state is written.
@pytest.mark.parametrize(("kind", "steps"), [*((kind, 2) for kind in KINDS), ("sgd", 0)])
@pytest.mark.parametrize("weights", ["trained on", "put back"])
def test_a_state_whose_optimizer_has_gone_on_is_refused(tmp_path, kind, steps, weights):
    model, optimizer = started(kind, steps)
    before = copy.deepcopy(model.state_dict())
    state = AdamWState.from_optimizer(model, optimizer)
    found = estimator(model, state)
    want = found.score(CANDIDATES).influence
    np.testing.assert_allclose(want, slow_influence(model, optimizer, CANDIDATES, REFERENCES, "exact"), rtol=1e-9)
    train(model, optimizer, 1)
    if weights == "put back":
        model.load_state_dict(before)
    changed = state.with_overrides(lr=1e-4)
    for use in (
        lambda: found.score(CANDIDATES),
        lambda: found.audit(CANDIDATES, k=2),
        lambda: estimator(model, state),
        lambda: estimator(model, changed),
        lambda: estimator(model, found.state),
        lambda: state.save(tmp_path),
    ):
        with pytest.raises(StateError, match=GONE_ON) as error:
            use()
        assert "\n" not in str(error.value)
    again = AdamWState.from_optimizer(model, optimizer)
    want = slow_influence(model, optimizer, CANDIDATES, REFERENCES, "exact")
    np.testing.assert_allclose(estimator(model, again).score(CANDIDATES).influence, want, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["first_order", "anchored", "exact"])
def test_an_optimizer_is_followed_where_a_state_of_it_would_be_refused(kind, method):
    model, optimizer = started(kind, 0 if kind == "sgd" else 2)
    found = estimator(model, optimizer, method)
    for seed in (9, 33):
        want = slow_influence(model, optimizer, CANDIDATES, REFERENCES, method, pilot=range(3))
        np.testing.assert_allclose(found.score(CANDIDATES).influence, want, rtol=1e-9)
        train(model, optimizer, 2, seed)


def test_loaded_moments_are_others():
    model, optimizer = started()
    state, saved = AdamWState.from_optimizer(model, optimizer), copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    with pytest.raises(StateError, match=GONE_ON):
        estimator(model, state)


def test_what_is_a_state_of_its_own_stays(tmp_path):
    model, optimizer = started()
    weights = copy.deepcopy(model.state_dict())
    state = AdamWState.from_optimizer(model, optimizer)
    want = estimator(model, state).score(CANDIDATES).influence
    state.save(tmp_path)
    own = copy.deepcopy(state)
    loaded = estimator(model, AdamWState.load(tmp_path))
    train(model, optimizer, 2)
    model.load_state_dict(weights)
    for found in (loaded, estimator(model, own), estimator(model, AdamWState.load(tmp_path))):
        np.testing.assert_array_equal(found.score(CANDIDATES).influence, want)


def test_a_state_outlives_its_optimizer():
    model, optimizer = started()
    state = AdamWState.from_optimizer(model, optimizer)
    want = estimator(model, optimizer).score(CANDIDATES).influence
    del optimizer
    np.testing.assert_array_equal(estimator(model, state).score(CANDIDATES).influence, want)
    next(iter(state.values())).exp_avg.mul_(2)
    with pytest.raises(StateError, match=GONE_ON):
        estimator(model, state)
