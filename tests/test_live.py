"""A model and an optimizer that their owner goes on using: contexts of mixed precision, training between calls."""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support import make_model, make_rows, plain_loss, slow_influence, warm_optimizer

from montessori import InfluenceEstimator, ScoreJournal
from montessori.errors import ArgumentError, DataError, ModelError, StateError
from montessori.losses import response_loss

METHODS = ["first_order", "anchored", "exact"]


def estimator(model, optimizer, **settings):
    return InfluenceEstimator(model, optimizer, make_rows(3, seed=2), **settings)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_and_switched_off_gradients_do_not_enter_the_scores(method):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    candidates = make_rows(5, seed=1)
    want = estimator(model, optimizer, method=method).score(candidates)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = estimator(model, optimizer, method=method).score(candidates)
    np.testing.assert_array_equal(got.influence, want.influence)
    with torch.inference_mode():
        got = estimator(model, optimizer, method=method).score(candidates)
    np.testing.assert_array_equal(got.influence, want.influence)


def test_a_model_that_keeps_the_states_of_its_last_pass_is_copied():
    model = make_model("llama_tied", torch.bfloat16)
    optimizer = warm_optimizer(model)
    candidates = make_rows(5, seed=1)
    want = estimator(model, optimizer).score(candidates)
    # RecurrentGemma's recurrent layers keep theirs so: with a graph, not as buffers.
    model.model.norm.register_forward_hook(lambda module, _, output: setattr(module, "state", output))
    found = estimator(model, optimizer)
    for _ in range(2):
        np.testing.assert_array_equal(found.score(candidates).influence, want.influence)


@pytest.fixture
def accelerator():
    """Of bfloat16; its settings are those of the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_prepared_for_mixed_precision_is_scored_in_its_own_and_left_prepared(method, accelerator):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    candidates = make_rows(5, seed=1)
    want = estimator(model, optimizer, method=method).score(candidates)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    forward = prepared.forward
    found = estimator(prepared, wrapped, method=method)
    np.testing.assert_array_equal(found.score(candidates).influence, want.influence)
    assert prepared.forward is forward
    if method == "first_order":
        assert found.audit(candidates, k=4).agreement["reference"].pearson > 0.99


def train(model, optimizer):
    for row in make_rows(4, seed=9):
        optimizer.zero_grad()
        plain_loss(model, row).backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_every_call_scores_the_step_that_the_optimizer_would_take_now(method):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(5, seed=1), make_rows(3, seed=2)
    found = estimator(model, optimizer, method=method, pilot=5)
    before = found.score(candidates)
    np.testing.assert_array_equal(found.score(candidates).influence, before.influence)
    train(model, optimizer)
    want = slow_influence(model, optimizer, candidates, references, method, pilot=range(5))
    np.testing.assert_allclose(found.score(candidates).influence, want, rtol=1e-9)
    optimizer.param_groups[0]["lr"] /= 100
    want = slow_influence(model, optimizer, candidates, references, method, pilot=range(5))
    np.testing.assert_allclose(found.score(candidates).influence, want, rtol=1e-7)
    assert np.abs(want).max() < 0.1 * np.abs(before.influence).max()


def test_what_does_not_change_is_computed_once(monkeypatch):
    model = make_model("llama_tied")
    found = estimator(model, warm_optimizer(model))
    candidates = make_rows(5, seed=1)
    found.score(candidates)
    monkeypatch.setattr("montessori.estimator.expand_at_anchor", None)
    found.score(candidates)
    found.audit(candidates, k=4)


def test_an_unfrozen_parameter_counts_from_then_on():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    found = estimator(model, optimizer, method="first_order")
    found.score(make_rows(2, seed=1))
    model.model.norm.weight.requires_grad_(False)
    candidates, references = make_rows(2, seed=1), make_rows(3, seed=2)
    want = slow_influence(model, optimizer, candidates, references, "first_order")
    np.testing.assert_allclose(found.score(candidates).influence, want, rtol=1e-9)


def test_a_journal_of_another_loss_is_refused(tmp_path):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)

    def scaled(factor):
        return lambda model, batch: factor * response_loss(model, batch)

    def score(loss):
        estimator(model, optimizer, loss_fn=loss).score(make_rows(5), journal=ScoreJournal(tmp_path / "journal"))

    score(scaled(2.0))
    score(scaled(2.0))
    for other in (scaled(3.0), response_loss):
        with pytest.raises(StateError, match=r"unfinished run with other (columns, )?loss"):
            score(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [-100, 4, 5, 500]}, "row 2: label 500 is outside the model's vocabulary of 61"),
        ({"labels": [-100, 4, 5, -1]}, "row 2: label -1 is outside"),
        ({"labels": [-100.0, 4.7, 5.0, 6.0]}, "expected integer labels, got torch.float32"),
        ({"labels": [True, False, True, True]}, "expected integer labels, got torch.bool"),
        ({"position_ids": [0, 1, 0, 1]}, "packed texts are not kept apart"),
        ({"position_ids": [20, 21, 22, 23]}, "count up by 1 from 0"),
    ],
)
def test_ids_and_labels_that_would_mean_something_else_name_their_row(changes, message):
    model = make_model("llama_tied")
    row = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6], **changes}
    with pytest.raises(DataError, match=message):
        estimator(model, warm_optimizer(model)).score([*make_rows(2), row])


def test_ids_of_any_integer_type_and_positions_that_count_up_are_taken():
    model = make_model("llama_tied")
    row = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}
    narrow = {"input_ids": np.array([3, 4, 5, 6], np.uint16), "labels": np.array([-100, 4, 5, 6], np.int16)}
    padded = {"input_ids": [0, *row["input_ids"]], "labels": [-100, *row["labels"]]}
    padded |= {"attention_mask": [0, 1, 1, 1, 1], "position_ids": [1, 0, 1, 2, 3]}
    influence = estimator(model, warm_optimizer(model)).score([row, narrow, padded]).influence
    np.testing.assert_allclose(influence, influence[0], rtol=1e-9)


def broken_loss(model, batch):
    """Not finite for an example with token 7."""
    broken = (batch.input_ids == 7).any(dim=1)
    return response_loss(model, batch) + torch.zeros(batch.size).masked_fill(broken, torch.inf)


def without_seven(rows):
    return [{key: [9 if token == 7 else token for token in ids] for key, ids in row.items()} for row in rows]


def test_rows_without_a_finite_score_leave_the_audit_and_are_named():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    broken = {"input_ids": [9, 7, 9, 7], "labels": [9, 7, 9, 7]}
    candidates = [*without_seven(make_rows(5, seed=1)), broken]
    options = {"loss_fn": broken_loss, "reference_loss_fn": broken_loss, "method": "first_order"}
    references = without_seven(make_rows(3, seed=2))
    audit = InfluenceEstimator(model, optimizer, references, **options).audit(candidates, k=6)
    assert audit.skipped == (5,) and audit.index.tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(audit.agreement["reference"].pearson)
    with pytest.raises(ArgumentError, match="at least 2 candidates with finite influence, got 1 of 2"):
        InfluenceEstimator(model, optimizer, references, **options).audit(candidates[4:], k=2)
    with pytest.raises(ModelError, match=r"^reference row 0: its loss is"):
        InfluenceEstimator(model, optimizer, [broken, *references], **options).score(candidates[:2])


@pytest.mark.parametrize("change", ["data", "numpy", "rows", "columns", "signs", "moment", "count", "buffer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_past_torch_are_noticed(change, dtype):
    model = make_model("llama_tied", dtype)
    optimizer = warm_optimizer(model)
    found, candidates = estimator(model, optimizer), make_rows(5, seed=1)
    before = found.score(candidates).influence
    entry = optimizer.state[model.model.norm.weight]
    with torch.no_grad():
        if change == "data":
            model.model.norm.weight.data.mul_(1.5)
        elif change == "numpy":
            model.model.norm.weight.detach().numpy()[0] = 3
        elif change in ("rows", "columns"):
            values = model.lm_head.weight.data
            values.copy_(values.flip(0 if change == "rows" else 1))
        elif change == "signs":
            model.lm_head.weight.data.neg_()
        elif change == "moment":
            entry["exp_avg"].data.add_(1e-3)
        elif change == "count":
            entry["step"].data.sub_(3)
        else:
            model.model.rotary_emb.inv_freq.data.mul_(0.5)
    after = found.score(candidates).influence
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, estimator(model, optimizer).score(candidates).influence)


def test_a_number_of_the_config_is_noticed():
    model = make_model("gemma2", torch.float32)
    found, candidates = estimator(model, warm_optimizer(model), method="first_order"), make_rows(5, seed=1)
    before = found.score(candidates)
    model.config.final_logit_softcapping = 0.5
    after = found.score(candidates)
    assert after.reference_loss != before.reference_loss and not np.array_equal(after.influence, before.influence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_of_a_module_is_noticed(dtype):
    model = make_model("llama_tied", dtype)
    optimizer = warm_optimizer(model)
    found, candidates = estimator(model, optimizer), make_rows(5, seed=1)
    before = found.score(candidates).influence
    model.model.norm.variance_epsilon = 0.5
    after = found.score(candidates).influence
    assert found.coverage.get("autograd", 0) == 0
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, estimator(model, optimizer).score(candidates).influence)


class Held(torch.nn.Module):
    """A norm whose output a tensor scales that is neither parameter nor buffer."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.scale, self.named = norm, torch.ones(()), {"scale": torch.ones(())}

    def forward(self, x):
        return self.norm(x) * self.scale * self.named["scale"]


def half(module, _arguments, output):
    return output / 2


CHANGES = {
    "tensor": lambda model: model.model.norm.scale.fill_(0.5),
    "another tensor": lambda model: setattr(model.model.norm, "scale", torch.tensor(0.5)),
    "tensor in a dict": lambda model: model.model.norm.named["scale"].fill_(0.5),
    "forward": lambda model: setattr(model.model.norm, "forward", lambda x, norm=model.model.norm.norm: norm(x) / 2),
    "hook": lambda model: model.model.norm.register_forward_hook(half),
    "activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.functional.relu),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_computes_otherwise_is_noticed(change):
    model = make_model("llama_tied", torch.float32)
    model.model.norm = Held(model.model.norm)
    for layer in model.model.layers:
        # Of transformers', some are modules, which are noticed by their parameters' names.
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.nn.functional.silu
    optimizer = warm_optimizer(model)
    found, candidates = estimator(model, optimizer), make_rows(5, seed=1)
    before = found.score(candidates).influence
    CHANGES[change](model)
    after = found.score(candidates).influence
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, estimator(model, optimizer).score(candidates).influence)


def test_a_learning_rate_that_is_a_tensor_is_noticed_to_the_last_digit():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.00100)
    found, candidates = estimator(model, optimizer), make_rows(5, seed=1)
    before = found.score(candidates).influence
    for group in optimizer.param_groups:
        group["lr"].fill_(0.00104)
    after = found.score(candidates).influence
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, estimator(model, optimizer).score(candidates).influence)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_frozen_and_freed_between_calls(method):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    found, candidates = estimator(model, optimizer, method=method), make_rows(5, seed=1)
    whole = found.score(candidates).influence
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = found.score(candidates).influence
    assert not np.array_equal(frozen, whole)
    np.testing.assert_array_equal(frozen, estimator(model, optimizer, method=method).score(candidates).influence)
    model.model.embed_tokens.weight.requires_grad_(True)
    np.testing.assert_array_equal(found.score(candidates).influence, whole)


def test_a_parameter_without_state_that_is_freed_is_named():
    model = make_model("llama_tied", torch.float32)
    model.model.norm.weight.requires_grad_(False)
    optimizer = warm_optimizer(model)
    found = estimator(model, optimizer)
    found.score(make_rows(5, seed=1))
    model.model.norm.weight.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(StateError, match=r"missing for trainable model\.norm\.weight"):
            found.score(make_rows(5, seed=1))


def test_regrouped_parameters_are_seen():
    model = make_model("llama_tied")
    groups = [{"params": list(model.model.layers[0].parameters()), "lr": 1e-3}]
    first = {id(parameter) for parameter in groups[0]["params"]}
    groups.append({"params": [p for p in model.parameters() if id(p) not in first], "lr": 1e-4})
    optimizer = torch.optim.AdamW(groups)
    take_a_step(model, optimizer)
    found = InfluenceEstimator(model, optimizer, make_rows(2, seed=2), method="first_order")
    before = found.score(make_rows(2, seed=1)).influence
    held = optimizer.param_groups
    held[0]["params"], held[1]["params"] = held[1]["params"], held[0]["params"]
    after = found.score(make_rows(2, seed=1)).influence
    fresh = InfluenceEstimator(model, optimizer, make_rows(2, seed=2), method="first_order")
    np.testing.assert_array_equal(after, fresh.score(make_rows(2, seed=1)).influence)
    assert np.abs(after - before).max() > 0.1 * np.abs(before).max()


def test_betas_that_are_tensors_are_seen_to_their_last_digit():
    model = make_model("llama_tied")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(torch.tensor(0.9), torch.tensor(0.999)))
    take_a_step(model, optimizer)
    found = InfluenceEstimator(model, optimizer, make_rows(2, seed=2), method="first_order")
    found.score(make_rows(2, seed=1))
    optimizer.param_groups[0]["betas"] = (torch.tensor(0.9), torch.tensor(0.99901))
    fresh = InfluenceEstimator(model, optimizer, make_rows(2, seed=2), method="first_order")
    again = [one.score(make_rows(2, seed=1)).influence for one in (found, fresh)]
    np.testing.assert_array_equal(*again)


def test_a_hook_that_comes_between_two_calls_is_seen():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    found = InfluenceEstimator(model, optimizer, make_rows(2, seed=2), method="first_order")
    found.score(make_rows(2, seed=1))
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(StateError, match="register_step_pre_hook"):
        found.score(make_rows(2, seed=1))


def take_a_step(model, optimizer) -> None:
    plain_loss(model, make_rows(1, seed=9)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
