"""The estimator against a loop of single-example backward passes, on every supported architecture."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import transformers
from support import CONFIGS, RECURRENT, VOCABULARY, make_model, make_rows, slow_influence, warm_optimizer

from montessori import InfluenceEstimator, ops, processes
from montessori.errors import ArgumentError, CurvatureWarning, DataError, FallbackWarning, ModelError, ResourceError

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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "falcon"])
@pytest.mark.filterwarnings("error::montessori.errors.FallbackWarning")
def test_mixtures_of_experts_are_captured_in_batches(name):
    model = make_model(name)
    optimizer = warm_optimizer(model)
    estimator = InfluenceEstimator(model, optimizer, make_rows(2, seed=4))
    assert "autograd" not in estimator.coverage
    assert sum(estimator.coverage.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.filterwarnings("error::montessori.errors.FallbackWarning")
def test_linear_attention_is_captured_in_batches(name):
    model = make_model(name, torch.float32)
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(6, seed=1), make_rows(3, seed=2)
    want = slow_influence(model, optimizer, candidates, references, "first_order")
    for batch_tokens in (12, 4096):
        got = estimate(model, optimizer, candidates, references, method="first_order", batch_tokens=batch_tokens)
        # Sums of some 10^4 products in float32; AdamW's root turns rounding of small gradients into more than that.
        np.testing.assert_allclose(got.influence, want, rtol=0, atol=1e-4 * np.abs(want).max())


def roberta(dtype, **settings):
    """Positions that start after the padding token's; not causal unless it is told to be."""
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=4, num_hidden_layers=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.3, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.RobertaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("method", ["first_order", "anchored", "exact"])
def test_positions_are_the_models_own(method):
    model = roberta(torch.float64, is_decoder=True)
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(4, seed=1), make_rows(3, seed=2)
    got = estimate(model, optimizer, candidates, references, method=method, pilot=4)
    np.testing.assert_allclose(
        got.influence, slow_influence(model, optimizer, candidates, references, method, pilot=range(4)), rtol=RTOL
    )


@pytest.mark.parametrize("method", ["first_order", "exact"])
def test_references_of_a_model_that_looks_ahead_do_not_see_each_other(method):
    model = roberta(torch.float32, is_decoder=False)
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(6, seed=1), make_rows(4, seed=2)
    with pytest.warns(FallbackWarning, match="depends on what shares its batch"):
        got = estimate(model, optimizer, candidates, references, method=method).influence
    want = slow_influence(model, optimizer, candidates, references, method)
    # Exact influences are differences of losses of size 4, in float32.
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 if method == "exact" else 1e-3 * np.abs(want).max())


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


def test_frequencies_that_follow_the_length_of_a_batch_are_those_of_each_example():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(8, seed=1, longest=24), make_rows(4, seed=2, longest=24)
    assert min(len(row["input_ids"]) for row in candidates) < 16 < max(len(row["input_ids"]) for row in candidates)
    got = estimate(model, optimizer, candidates, references, method="first_order", max_length=64)
    want = slow_influence(model, optimizer, candidates, references, "first_order")
    np.testing.assert_allclose(got.influence, want, rtol=1e-6)


def test_a_piece_of_rows_may_be_nothing_but_such_as_are_skipped():
    model = make_model("llama_tied")
    rows = make_rows(4, seed=1)
    skipping = InfluenceEstimator(
        model, warm_optimizer(model), make_rows(3), max_length=30, truncation="skip", invalid_rows="skip"
    )
    bad = [{"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": [5] * 40, "labels": [5] * 40}, {"id": 1}]
    scores = skipping.score(bad, pilot_rows=rows)
    assert scores.status.tolist() == ["no_label_tokens", "too_long", "invalid"]
    assert np.isnan(scores.influence).all()
    with pytest.raises(DataError, match="no row has a label token"):
        skipping.score(bad)


def change_middle(tensor):
    with torch.no_grad():
        tensor.view(-1)[tensor.numel() // 2] += 1


DIFFERING = {
    "rows": (
        lambda estimator: {"rows": make_rows(4, seed=2)},
        "candidates, columns|candidates, batch_tokens|candidates",
    ),
    "pilots": (lambda estimator: {"pilot_rows": make_rows(1)}, "pilot_rows"),
    "batches": (lambda estimator: {"batch_tokens": 12}, "batch_tokens"),
    "a weight": (lambda estimator: change_middle(estimator.model.lm_head.weight), "model"),
    "a number": (lambda estimator: setattr(estimator.model.model.norm, "variance_epsilon", 0.1), "model"),
    "a moment": (lambda estimator: change_middle(estimator.state["model.norm.weight"].exp_avg), "optimizer"),
}


@pytest.mark.parametrize("change", DIFFERING)
def test_processes_that_differ_are_told(monkeypatch, change):
    model = make_model("llama_tied")
    estimator = InfluenceEstimator(model, warm_optimizer(model), make_rows(3))
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    seen = []

    def from_all(value):
        seen.append(value)
        if len(seen) == 1:
            raise InterruptedError
        return [value, seen[0]]

    monkeypatch.setattr(processes, "from_all", from_all)
    with pytest.raises(InterruptedError):
        estimator.score(make_rows(4, seed=1), distributed=True)
    made, names = DIFFERING[change]
    settings = made(estimator) or {}
    rows = settings.pop("rows", make_rows(4, seed=1))
    with pytest.raises(ArgumentError, match=rf"expected the same on every process, got .*({names}).* on process 0"):
        estimator.score(rows, distributed=True, **settings)


def test_what_fails_on_one_process_is_told_to_the_others(monkeypatch):
    """As process 0 sees it, and as the one that fails does."""

    def broken():
        raise ModelError("row 3 is wrong")

    monkeypatch.setattr(processes, "_several", lambda: True)
    monkeypatch.setattr(processes, "from_all", lambda told: [told, (None, "ModelError: row 3 is wrong")])
    with pytest.raises(ResourceError, match=r"process 1 failed \(ModelError: row 3 is wrong\)"):
        processes.all_do(lambda: 1)
    with pytest.raises(ModelError, match="row 3 is wrong"):
        processes.all_do(broken)


@pytest.mark.parametrize("lr", [True, [1e-3], "1", 1e39])
def test_a_learning_rate_that_is_no_number_is_an_error(lr):
    model = make_model("llama_tied")
    with pytest.raises(ArgumentError, match=r"^lr="):
        InfluenceEstimator(model, warm_optimizer(model), make_rows(3), lr=lr)


def test_what_is_no_journal_and_no_number_of_candidates_is_an_error(tmp_path):
    model = make_model("llama_tied")
    estimator = InfluenceEstimator(model, warm_optimizer(model), make_rows(3))
    with pytest.raises(ArgumentError, match="expected a ScoreJournal, got PosixPath"):
        estimator.score(make_rows(3, seed=1), journal=tmp_path / "journal.jsonl")
    with pytest.raises(ArgumentError, match=r"^k=1.5: expected a number of candidates"):
        estimator.audit(make_rows(3, seed=1), k=1.5)


@pytest.mark.skipif("cpu" not in ops.available_impls(), reason="no compiled kernels")
@pytest.mark.parametrize("method", ["first_order", "anchored", "exact"])
def test_plain_torch_asked_for_by_name_is_all_that_computes(monkeypatch, method):
    """The anchor's step and the drift included."""
    for table in (ops._LINEAR, ops._DENSE, ops._STEP):
        monkeypatch.delitem(table, "cpu")
    model = make_model("llama_tied", torch.float32)
    estimate(model, warm_optimizer(model), make_rows(3, seed=1), make_rows(2), method=method, backend="reference")
    with pytest.raises(KeyError, match="cpu"):
        estimate(model, warm_optimizer(model), make_rows(3, seed=1), make_rows(2), method=method, backend="cpu")
