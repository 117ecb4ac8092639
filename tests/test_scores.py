"""What a score run returns, and what it says of candidates that cannot be scored."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import make_model, make_rows, warm_optimizer

from montessori import InfluenceEstimator, ScoreJournal, Scores, reading, scorers
from montessori.errors import ArgumentError, DataError, ModelError, ResourceError, StateError
from montessori.losses import response_loss
from montessori.passes import out_of_memory


@pytest.fixture(scope="module")
def warm():
    model = make_model("llama_tied")
    return model, warm_optimizer(model)


def test_named_sets_are_scored_together_as_if_alone(warm):
    sets = {"easy": make_rows(3, seed=2), "hard": make_rows(5, seed=3)}
    candidates = make_rows(6, seed=1)
    together = InfluenceEstimator(*warm, sets).score(candidates)
    assert together.names == ("easy", "hard")
    assert together.influence.shape == together.centred.shape == (6, 2)
    for k, rows in enumerate(sets.values()):
        alone = InfluenceEstimator(*warm, rows).score(candidates)
        np.testing.assert_allclose(together.influence[:, k], alone.influence, rtol=1e-9)
        np.testing.assert_allclose(together.drift[k], alone.drift, rtol=1e-9)


@pytest.mark.parametrize("reference", [make_rows(3), {"a": make_rows(3), "b": make_rows(2, seed=1)}])
def test_saved_scores_come_back_equal(warm, reference, tmp_path):
    rows = make_rows(5, seed=1)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    scores = InfluenceEstimator(*warm, reference).score(rows)
    loaded = Scores.load(scores.save(tmp_path / "deep" / "scores.parquet"))
    for field in ("influence", "centred", "drift", "loss", "num_tokens", "num_label_tokens", "reference_loss"):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(scores, field))
    assert (loaded.names, loaded.method, loaded.info) == (scores.names, scores.method, scores.info)
    assert loaded.skipped == scores.skipped == {2: "no_label_tokens"}
    assert loaded == scores and scores != "scores"
    assert replace(scores, loss=scores.loss + 1) != scores != replace(scores, method="exact")
    frame, dataset = scores.to_pandas(), scores.to_dataset()
    assert list(frame.columns) == dataset.column_names
    assert frame["status"].tolist() == ["ok", "ok", "no_label_tokens", "ok", "ok"]


def test_rows_that_were_cut_are_a_column_and_no_part_of_the_metadata(warm, tmp_path):
    def saved(rows):
        estimator = InfluenceEstimator(
            *warm, make_rows(3, longest=5), method="first_order", max_length=5, truncation="right"
        )
        scores = estimator.score(rows)
        return scores, pq.read_table(scores.save(tmp_path / "scores.parquet"))

    rows = make_rows(60, seed=1)
    cut = [index for index, row in enumerate(rows) if len(row["input_ids"]) > 5]
    scores, table = saved(rows)
    assert len(cut) > 30 and scores.info["truncated"] == cut
    assert np.flatnonzero(table["truncated"].to_numpy()).tolist() == cut
    assert Scores.load(tmp_path / "scores.parquet") == scores
    few, small = saved(make_rows(3, longest=5))
    assert "truncated" not in small.column_names and few.info["truncated"] == []
    assert Scores.load(tmp_path / "scores.parquet") == few

    def metadata(table):
        return json.loads(table.schema.metadata[b"montessori"])

    assert "truncated" not in metadata(table)["info"]
    # Earlier versions had the numbers of these rows there.
    earlier = {**metadata(table), "info": {**metadata(table)["info"], "truncated": cut, "invalid": {}}}
    table = table.drop_columns("truncated").replace_schema_metadata({b"montessori": json.dumps(earlier).encode()})
    pq.write_table(table, tmp_path / "earlier.parquet")
    assert Scores.load(tmp_path / "earlier.parquet") == scores


def test_scores_that_lost_a_column_are_refused(warm, tmp_path):
    table = InfluenceEstimator(*warm, make_rows(3)).score(make_rows(2, seed=1)).to_table()
    pq.write_table(table.drop_columns("loss"), tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"part\.parquet: expected the columns .* that montessori score writes.*loss"):
        Scores.load(tmp_path / "part.parquet")


def test_candidates_without_labels_are_reported_not_zero(warm):
    rows = make_rows(4, seed=1)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    scores = InfluenceEstimator(*warm, make_rows(3)).score(rows)
    assert scores.skipped == {1: "no_label_tokens"}
    assert np.isnan(scores.influence[1]) and np.isnan(scores.loss[1])
    assert np.isfinite(scores.influence[[0, 2, 3]]).all()


@pytest.mark.parametrize("method", ["anchored", "first_order", "exact"])
def test_a_candidate_that_is_not_finite_is_reported_and_the_others_are_scored(warm, method):
    rows = make_rows(5, seed=1)
    bad = rows[3]["input_ids"]

    def loss(model, batch):
        is_bad = [ids[: len(bad)].tolist() == bad for ids in batch.input_ids]
        return response_loss(model, batch) * torch.where(torch.tensor(is_bad), torch.nan, 1.0)

    settings = {"method": method, "pilot": 0}
    got = InfluenceEstimator(*warm, make_rows(3), **settings, loss_fn=loss).score(rows)
    want = InfluenceEstimator(*warm, make_rows(3), **settings).score(rows)
    assert got.skipped == {3: "non_finite"}
    others = [0, 1, 2, 4]
    np.testing.assert_allclose(got.influence[others], want.influence[others], rtol=1e-9)
    with_pilots = InfluenceEstimator(*warm, make_rows(3), method=method, pilot=5, loss_fn=loss).score(rows)
    assert with_pilots.skipped == {3: "non_finite"}
    assert np.isfinite(with_pilots.influence[others]).all()


def test_own_losses_are_used_for_candidates_and_reference(warm):
    def doubled(model, batch):
        return 2 * response_loss(model, batch)

    rows, reference = make_rows(4, seed=1), make_rows(3)
    plain = InfluenceEstimator(*warm, reference, method="first_order").score(rows)
    on_reference = InfluenceEstimator(*warm, reference, method="first_order", reference_loss_fn=doubled).score(rows)
    np.testing.assert_allclose(on_reference.influence, 2 * plain.influence, rtol=1e-9)
    assert on_reference.reference_loss == pytest.approx(2 * plain.reference_loss)
    on_candidates = InfluenceEstimator(*warm, reference, method="first_order", loss_fn=doubled).score(rows)
    np.testing.assert_allclose(on_candidates.loss, 2 * plain.loss, rtol=1e-12)
    assert not np.allclose(on_candidates.influence, plain.influence, rtol=1e-3)


def test_drift_is_the_influence_of_a_step_without_gradient(warm):
    def zero(model, batch):
        return 0 * response_loss(model, batch)

    for method in ("anchored", "first_order", "exact"):
        scores = InfluenceEstimator(*warm, make_rows(3), method=method, pilot=0, loss_fn=zero).score(make_rows(2))
        np.testing.assert_allclose(scores.influence, scores.drift, rtol=1e-9)
        # centred is a difference of two equal numbers: only rounding of the larger ones is left.
        assert np.abs(scores.centred).max() <= 1e-9 * abs(scores.drift)


def test_audit_compares_with_real_steps(warm):
    audit = InfluenceEstimator(*warm, make_rows(3), pilot=3).audit(make_rows(12, seed=1), k=6)
    assert len(audit.index) == audit.agreement["reference"].num_examples == 6
    assert audit == replace(audit) != replace(audit, real=-audit.real)
    exact = InfluenceEstimator(*warm, make_rows(3), method="exact").score(make_rows(12, seed=1))
    np.testing.assert_allclose(audit.real[:, 0], exact.influence[audit.index], rtol=1e-9)
    assert audit.pearson > 0.99


def test_rows_are_read_once_for_what_several_calls_are_given(warm, monkeypatch):
    rows = make_rows(12, seed=1)
    estimator = InfluenceEstimator(*warm, make_rows(3), pilot=3)
    scores, audit = estimator.score(rows), estimator.audit(rows, k=4)
    read = estimator.read(rows)
    with pytest.raises(ArgumentError, match="candidates: expected rows or what this estimator has read"):
        estimator.score(replace(read, reader=None))
    monkeypatch.setattr(reading, "encode_rows", lambda *_, **__: pytest.fail("read again"))
    assert estimator.score(read) == scores and estimator.audit(read, k=4) == audit
    estimator.prepare(read)


def test_an_audit_of_fewer_than_two_candidates_says_so(warm):
    for k in (1, 0, -1, True):
        with pytest.raises(ArgumentError, match=f"k={k}: expected a number of candidates, 2 at least"):
            InfluenceEstimator(*warm, make_rows(3)).audit(make_rows(4, seed=1), k=k)


@pytest.mark.parametrize("settings", [{}, {"method": "first_order", "reference_dtype": "model"}])
def test_a_model_of_two_dtypes_that_do_not_meet_says_what_to_do(settings):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ModelError, match=r"cast the model to one dtype, as with model\.to\(torch\.float32\)"):
        InfluenceEstimator(model, optimizer, make_rows(3), **settings).score(make_rows(2, seed=1))


def test_learning_rate_can_be_given(warm):
    rows, reference = make_rows(3, seed=1), make_rows(3)
    small, large = (
        InfluenceEstimator(*warm, reference, method="first_order", lr=lr).score(rows).influence for lr in (1e-4, 3e-4)
    )
    np.testing.assert_allclose(large, 3 * small, rtol=1e-9)


def test_a_model_in_bfloat16_is_scored_against_a_float32_reference():
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    rows, reference = make_rows(6, seed=1), make_rows(4)
    full = InfluenceEstimator(model, optimizer, reference).score(rows)
    half = InfluenceEstimator(model.bfloat16(), optimizer, reference).score(rows)
    # The weights themselves are rounded to 8 bits; ranks of a random tiny model survive that.
    assert np.corrcoef(full.influence, half.influence)[0, 1] > 0.95
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_reference_in_the_dtype_of_the_model_needs_no_float32_copy(monkeypatch):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    rows, reference = make_rows(12, seed=1), make_rows(4)
    same = [
        InfluenceEstimator(model, optimizer, reference, "first_order", reference_dtype=dtype).score(rows)
        for dtype in ("float32", "model")
    ]
    np.testing.assert_array_equal(same[0].influence, same[1].influence)
    model.bfloat16()
    wide = InfluenceEstimator(model, optimizer, reference, "first_order").score(rows)
    estimator = InfluenceEstimator(model, optimizer, reference, "first_order", reference_dtype="model")
    monkeypatch.setattr(type(model), "__deepcopy__", None, raising=False)
    narrow = estimator.score(rows)
    # Only q differs. Its relative error is that of a bfloat16 backward pass, some units of 2⁻⁸ (see TOLERANCE of
    # montessori.coverage), and the same for all candidates but for its projection on each step.
    steps = np.abs(wide.influence - wide.drift).max() + abs(wide.drift)
    assert np.abs(narrow.influence - wide.influence).max() < 5e-2 * steps
    assert np.corrcoef(narrow.influence, wide.influence)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "psychic"}, ArgumentError, ["psychic", "anchored"]),
        ({"backend": "abacus"}, ArgumentError, ["abacus", "reference"]),
        ({"pilot": -1}, ArgumentError, ["pilot=-1"]),
        ({"max_grad_norm": 0.0}, ArgumentError, ["max_grad_norm"]),
        ({"max_grad_norm": True}, ArgumentError, ["max_grad_norm=True"]),
        ({"max_grad_norm": np.float32("nan")}, ArgumentError, ["max_grad_norm=", "nan"]),
        ({"max_grad_norm": np.float32(-1)}, ArgumentError, ["max_grad_norm=", "-1"]),
        ({"truncation": "left"}, ArgumentError, ["left", "right"]),
        ({"reference_weighting": "best"}, ArgumentError, ["best", "token_mean"]),
        ({"reference_dtype": "bfloat16"}, ArgumentError, ["bfloat16", "float32, model"]),
        ({"reference_dtype": "model"}, ArgumentError, ["anchored", "method='first_order'"]),
        ({"max_length": 4}, DataError, ["4 tokens", "raise"]),
    ],
)
def test_wrong_settings_are_one_line_errors(warm, change, error, words):
    with pytest.raises(error) as caught:
        InfluenceEstimator(*warm, make_rows(3), **change)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("method", ["anchored", "exact"])
def test_numbers_of_numpy_are_numbers(warm, tmp_path, method):
    def score(limit, journal=None):
        estimator = InfluenceEstimator(*warm, make_rows(3, seed=2), method, max_grad_norm=limit)
        return estimator.score(make_rows(3, seed=1), journal=journal).influence

    want = score(0.5)
    np.testing.assert_array_equal(score(np.float32(0.5), ScoreJournal(tmp_path / "journal")), want)
    np.testing.assert_array_equal(score(0.5, ScoreJournal(tmp_path / "journal")), want)


def test_bad_references_and_candidates(warm):
    unlabelled = [{**row, "labels": [-100] * len(row["labels"])} for row in make_rows(2)]
    with pytest.raises(DataError, match="no row has a label token"):
        InfluenceEstimator(*warm, unlabelled)
    with pytest.raises(DataError, match=r"row 2: no_label_tokens"):
        InfluenceEstimator(*warm, make_rows(2) + unlabelled[:1])
    estimator = InfluenceEstimator(*warm, make_rows(3))
    with pytest.raises(ArgumentError, match="tokenizer="):
        estimator.score([{"instruction": "Say hello.", "response": "Hello."}])
    with pytest.raises(DataError, match="token id 900 is outside the model's vocabulary of 61"):
        estimator.score([{"input_ids": [1, 900], "labels": [-100, 900]}])
    with pytest.raises(ResourceError, match="batch_tokens=2"):
        estimator.score(make_rows(3), batch_tokens=2)


def test_models_that_cannot_be_scored():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    other = make_model("gpt2")
    with pytest.raises(StateError, match="not in the model"):
        InfluenceEstimator(other, optimizer, make_rows(2))
    with pytest.raises(StateError, match="step 0"):
        InfluenceEstimator(model, torch.optim.AdamW(model.parameters()), make_rows(2))
    with pytest.raises(StateError, match="Adagrad"):
        InfluenceEstimator(model, torch.optim.Adagrad(model.parameters()), make_rows(2))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight has NaN"):
        InfluenceEstimator(model, optimizer, make_rows(2))


def short_of_memory(monkeypatch, largest):
    """Batches of more than `largest` examples run out of memory."""
    original = scorers.LinearScorer._score

    def limited(self, group):
        if len(group) > largest:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, group)

    monkeypatch.setattr(scorers.LinearScorer, "_score", limited)


@pytest.mark.parametrize("largest", [4, 2, 1])
def test_out_of_memory_halves_the_batch_until_it_fits_and_says_so(warm, monkeypatch, largest):
    rows, estimator = make_rows(8, seed=1), InfluenceEstimator(*warm, make_rows(3))
    want = estimator.score(rows).influence
    short_of_memory(monkeypatch, largest)
    with pytest.warns(ResourceWarning, match="lower batch_tokens"):
        got = estimator.score(rows).influence
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no matter what"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("linear_scores, kernel mma, 8 tokens: cudaErrorMemoryAllocation: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack.data(), 1) API call failed at ops.h'), True),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), False),
        (RuntimeError('torch_call_dispatcher( "aten::sum", "", stack.data(), 1) API call failed at ops.h'), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_known_by_whoever_tells_it(error, told):
    assert out_of_memory(error) is told


def test_an_example_that_does_not_fit_alone_is_an_error(warm, monkeypatch):
    rows, estimator = make_rows(8, seed=1), InfluenceEstimator(*warm, make_rows(3))
    short_of_memory(monkeypatch, largest=0)
    with pytest.warns(ResourceWarning), pytest.raises(ResourceError, match=r"one example of \d+ tokens: lower"):
        estimator.score(rows)


def test_no_tensor_of_a_candidate_outlives_its_batch(warm, monkeypatch):
    original, alive = scorers.LinearScorer._score, []

    def watched(self, group):
        gc.collect()
        alive.append(sum(t.nbytes for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)))
        return original(self, group)

    monkeypatch.setattr(scorers.LinearScorer, "_score", watched)
    row = make_rows(1, seed=1)[0]
    InfluenceEstimator(*warm, make_rows(3)).score([row] * 12, batch_tokens=len(row["input_ids"]))
    assert len(alive) == 12
    assert alive[-1] == alive[1]
