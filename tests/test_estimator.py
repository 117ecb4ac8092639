"""The estimator against a loop of single-example backward passes, on every supported architecture."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from support import CONFIGS, make_model, make_rows, slow_influence, warm_optimizer

from montessori import InfluenceEstimator
from montessori.errors import CurvatureWarning

MODELS = [*CONFIGS, "llama_lora"]
# Two orders of summation in float64 over some 10^4 terms; 1e-9 leaves room for cancellation.
RTOL = 1e-9

pytestmark = pytest.mark.filterwarnings("ignore::montessori.errors.FallbackWarning")


def estimate(model, optimizer, candidates, references, **settings):
    batch_tokens = settings.pop("batch_tokens", 4096)
    estimator = InfluenceEstimator(model, optimizer, references, **settings)
    return estimator.score(candidates, batch_tokens=batch_tokens)


@pytest.mark.parametrize("method", ["first_order", "anchored", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_single_example_loop(name, method):
    model = make_model(name)
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(6, seed=1), make_rows(4, seed=2)
    # With a pilot as large as the set, the anchor is the mean over all candidates.
    got = estimate(model, optimizer, candidates, references, method=method, pilot=6)
    want = slow_influence(model, optimizer, candidates, references, method, pilot=range(6))
    np.testing.assert_allclose(got.influence, want, rtol=RTOL)
    assert np.ptp(want) > 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", MODELS)
def test_batch_size_order_and_padding_side_do_not_matter(name):
    model = make_model(name)
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(8, seed=3), make_rows(3, seed=4)
    one = estimate(model, optimizer, candidates, references, batch_tokens=12)
    eight = estimate(model, optimizer, candidates, references, batch_tokens=8 * 12)
    np.testing.assert_allclose(eight.influence, one.influence, rtol=RTOL)
    order = np.random.default_rng(0).permutation(8)
    shuffled = estimate(model, optimizer, [candidates[i] for i in order], references, batch_tokens=48)
    np.testing.assert_allclose(shuffled.influence, one.influence[order], rtol=RTOL)
    for left in (True, False):
        padded = [pad(row, 14, left) for row in candidates]
        got = estimate(model, optimizer, padded, references, batch_tokens=48)
        np.testing.assert_allclose(got.influence, one.influence, rtol=RTOL)


def pad(row, length, left):
    missing = length - len(row["input_ids"])
    filled = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    row = {**row, "attention_mask": [1] * len(row["input_ids"])}
    return {key: [fill] * missing + row[key] if left else row[key] + [fill] * missing for key, fill in filled.items()}


def test_a_step_too_large_for_a_linear_prediction_is_named():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(4, seed=1), make_rows(2, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        small = estimate(model, optimizer, candidates, references, lr=1e-6)
    assert 0 < small.info["curvature"][0] < 0.01
    with pytest.warns(CurvatureWarning, match="reference: .* apart, expected less than 10%"):
        large = estimate(model, optimizer, candidates, references, lr=1.0)
    assert 0.1 < large.info["curvature"][0] <= 1
