"""Loss functions of the user's own: what they are given, and what they do to the rows of a batch."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import make_model, make_rows, make_text_rows, make_tokenizer, warm_optimizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from montessori import InfluenceEstimator
from montessori.errors import ArgumentError, DataError, FallbackWarning, ModelError
from montessori.losses import response_loss

ROWS = [{**row, "prompt_id": number // 3, "reward": number**2 % 7} for number, row in enumerate(make_rows(9, seed=1))]
REFERENCES = make_rows(3, seed=2)


def column(batch, name):
    return torch.tensor([row[name] for row in batch.rows], dtype=torch.float64)


def of_its_prompt(model, batch):
    """Advantages within the batch: the rows of a prompt change each other's loss. References have no prompt."""
    reward = column(batch, "reward")
    prompts = [row["prompt_id"] for row in batch.rows]
    means = [reward[[one == prompt for one in prompts]].mean() for prompt in prompts]
    return (reward + 1 - torch.stack(means)) * response_loss(model, batch)


def rows_turned(model, batch):
    """The model reads the rows from the last to the first."""
    logits = model(input_ids=batch.input_ids.flip(0)).logits.flip(0)[:, :-1]
    targets = batch.labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (1 + column(batch, "reward")) * losses.sum(1) / (targets != -100).sum(1)


def live_rows_only(model, batch):
    """Rows without a reward are not given to the model."""
    losses = torch.zeros(batch.size, dtype=torch.float64)
    live = (column(batch, "reward") > 3).nonzero().flatten()
    if live.numel():
        logits = model(input_ids=batch.input_ids[live]).logits[:, :-1]
        targets = batch.labels[live, 1:]
        found = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1) / (targets != -100).sum(1)
        losses = losses.index_add(0, live, found)
    return losses


def one_by_one(estimator, rows):
    return np.array([estimator.score([row], pilot_rows=rows).influence[0] for row in rows])


@pytest.mark.parametrize("method", ["first_order", "anchored"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "llama_lora"])
@pytest.mark.parametrize("loss", [of_its_prompt, rows_turned, live_rows_only])
def test_rows_that_do_not_stand_alone_in_a_batch_are_scored_alone(loss, name, method):
    model = make_model(name)
    optimizer = warm_optimizer(model)
    rows = ROWS if loss is of_its_prompt else [{**row, "input_ids": row["input_ids"][:3] * 3} for row in ROWS]
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows]
    estimator = InfluenceEstimator(model, optimizer, REFERENCES, method, loss_fn=loss)
    with pytest.warns(FallbackWarning, match=r"one (example )?at a time"):
        together = estimator.score(rows).influence
    # The same sums in float64, in another order.
    np.testing.assert_allclose(together, one_by_one(estimator, rows), rtol=1e-9, atol=1e-15)
    exact = InfluenceEstimator(model, optimizer, REFERENCES, "exact", loss_fn=loss).score(rows).influence
    np.testing.assert_allclose(together, exact, rtol=0, atol=0.05 * np.ptp(exact))
    assert estimator.audit(rows, k=9).agreement["reference"].pearson > 0.99


def first_first(model, batch, cut):
    """The rows are sorted for the model, as a packing collator may do it."""
    order = column(batch, "reward").argsort()
    ids, targets = batch.input_ids[order][:, : batch.labels.shape[1] - cut], batch.labels[order, 1:]
    logits = model(input_ids=ids).logits[:, : targets.shape[1]]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses.sum(1) / (targets != -100).sum(1))[order.argsort()]


@pytest.mark.parametrize("cut", [0, 1])
def test_rows_that_are_sorted_are_found_where_those_of_the_proof_were_in_order(cut):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    rows = [{**row, "input_ids": row["input_ids"][:3] * 3} for row in make_rows(8, seed=1)]
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]], "reward": (5 * n) % 8} for n, row in enumerate(rows)]
    proved = sorted(rows, key=lambda row: row["reward"])[::7]
    estimator = InfluenceEstimator(model, optimizer, REFERENCES, "first_order", loss_fn=partial(first_first, cut=cut))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        estimator.score(proved)
        together = estimator.score(rows, pilot_rows=proved).influence
        alone = [estimator.score([row], pilot_rows=proved).influence[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", ["exact", "anchored", "first_order"])
def test_references_that_meet_in_the_loss_are_taken_alone(method):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    references = [{**row, "prompt_id": n // 2, "reward": 1.0 + n} for n, row in enumerate(make_rows(8, seed=2))]

    def weighted(model, batch):
        reward, prompts = column(batch, "reward"), [row["prompt_id"] for row in batch.rows]
        means = torch.stack([reward[[one == prompt for one in prompts]].mean() for prompt in prompts])
        return reward / means * response_loss(model, batch)

    with pytest.warns(FallbackWarning, match="the reference is taken one row at a time"):
        got = InfluenceEstimator(model, optimizer, references, method, reference_loss_fn=weighted).score(ROWS).influence
    plain = InfluenceEstimator(model, optimizer, references, method).score(ROWS).influence
    # Alone, every reward is its own mean. Losses near 4 in float32.
    np.testing.assert_allclose(got, plain, rtol=0, atol=1e-5 if method == "exact" else 1e-3 * np.abs(plain).max())


def test_a_loss_without_any_gradient_is_an_error():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    rows = [{**row, "reward": 0} for row in ROWS]
    for method in ("exact", "anchored", "first_order"):
        with pytest.raises(ModelError, match="does not depend on any trainable parameter"):
            InfluenceEstimator(model, optimizer, REFERENCES, method, loss_fn=live_rows_only).score(rows)


def test_a_weight_that_only_candidates_use_behind_its_module_is_found():
    """In rows with a penalty, which references do not have."""
    model = make_model("llama_untied")
    optimizer = warm_optimizer(model)

    def loss(model, batch):
        penalty = model.lm_head.weight.square().sum() + model.model.embed_tokens.weight[5].square().sum()
        return response_loss(model, batch) + column(batch, "penalty") * penalty

    rows = [{**row, "penalty": 0.1 * (1 + number)} for number, row in enumerate(make_rows(5, seed=1))]
    estimator = InfluenceEstimator(model, optimizer, REFERENCES, "first_order", loss_fn=loss, lr=1e-6)
    exact = InfluenceEstimator(model, optimizer, REFERENCES, "exact", loss_fn=loss, lr=1e-6).score(rows).influence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        got = estimator.score(rows).influence
    np.testing.assert_allclose(got, exact, rtol=0, atol=0.01 * np.ptp(exact))


class Scored(nn.Module):
    """A head beside the model."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((16,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("method", ["exact", "anchored", "first_order"])
def test_gradients_of_what_a_loss_brings_along_are_left_as_they_were(method):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    teacher, fresh = make_model("llama_tied", seed=1), Scored()
    before = {name: torch.full_like(parameter, 0.25) for name, parameter in teacher.named_parameters()}
    for name, parameter in teacher.named_parameters():
        parameter.grad = before[name].clone()

    def distilled(model, batch):
        student, taught = (one(input_ids=batch.input_ids).logits[:, :-1] for one in (model, teacher))
        divergence = F.kl_div(student.log_softmax(-1), taught.softmax(-1), reduction="none").sum(-1)
        counted = (batch.labels[:, 1:] != -100).double()
        return (divergence * counted).sum(1) / counted.sum(1) + fresh.weight.sum()

    losses = {"loss_fn": distilled, "reference_loss_fn": distilled}
    InfluenceEstimator(model, optimizer, REFERENCES, method, **losses).score(ROWS)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter.grad, before[name])
    assert fresh.weight.grad is None
    optimizer.add_param_group({"params": [fresh.weight]})
    with pytest.raises(ModelError, match=r"parameter \[16\] that the optimizer trains and the model does not have"):
        InfluenceEstimator(model, optimizer, REFERENCES, method, **losses).score(ROWS)
    assert fresh.weight.grad is None


@pytest.mark.parametrize("longer", [0, 2])
@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt_oss", "opt", "gpt2", "falcon"])
def test_further_texts_are_captured_in_batches(name, longer):
    """Rejected answers, as long as the rows and padded elsewhere, or longer."""
    model = make_model(name)
    optimizer = warm_optimizer(model)
    rows = make_rows(6, seed=1)
    rows = [
        {**one, "rejected": [(token + 1) % 61 for token in other["input_ids"]] + [3] * longer}
        for one, other in zip(rows, reversed(rows), strict=True)
    ]

    def margin(model, batch):
        rejected = pad_sequence([torch.tensor(row["rejected"]) for row in batch.rows], batch_first=True)
        lengths = torch.tensor([len(row["rejected"]) for row in batch.rows])
        logits = model(input_ids=rejected).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), rejected[:, 1:], reduction="none")
        counted = torch.arange(1, rejected.shape[1])[None] < lengths[:, None]
        return F.softplus(response_loss(model, batch) - (losses * counted).sum(1) / counted.sum(1))

    estimator = InfluenceEstimator(model, optimizer, REFERENCES, "first_order", loss_fn=margin)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        together = estimator.score(rows).influence
    np.testing.assert_allclose(together, one_by_one(estimator, rows), rtol=1e-9)


class Dropped(nn.Module):
    """A loss that is a module, in train mode, with a teacher under activation checkpointing whose gradients step it."""

    def __init__(self, teacher):
        super().__init__()
        self.dropout, self.teacher = nn.Dropout(0.5), teacher

    def forward(self, model, batch):
        hidden = self.teacher.model.embed_tokens(batch.input_ids).requires_grad_()
        taught = checkpoint(self.teacher.model.layers[0].mlp, hidden, use_reentrant=True).mean((1, 2))
        return response_loss(model, batch) + 0.01 * self.dropout(taught)


@pytest.mark.parametrize("method", ["exact", "anchored"])
def test_modules_that_a_loss_holds_are_in_eval_mode_and_left_as_they_were(method):
    model, teacher = make_model("llama_tied"), make_model("llama_tied", seed=1).train()
    optimizer = warm_optimizer(model)
    loss, stepped = Dropped(teacher).train(), []
    for parameter in teacher.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
        parameter.register_post_accumulate_grad_hook(lambda parameter: stepped.append(parameter))
    scored = InfluenceEstimator(model, optimizer, REFERENCES, method, loss_fn=loss).score(ROWS)
    again = InfluenceEstimator(model, optimizer, REFERENCES, method, loss_fn=loss).score(ROWS)
    np.testing.assert_array_equal(scored.influence, again.influence)
    assert not stepped and all((parameter.grad == 0.25).all() for parameter in teacher.parameters())
    assert all(module.training for module in loss.modules())


def test_a_loss_that_draws_random_numbers_is_an_error():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)

    def drawn(model, batch):
        return response_loss(model, batch) * (1 + torch.rand(()))

    for role in ("loss_fn", "reference_loss_fn"):
        for method in ("exact", "first_order"):
            with pytest.raises(ModelError, match=r"row \d: the loss function gives .* expected the same value again"):
                InfluenceEstimator(model, optimizer, REFERENCES, method, **{role: drawn}).score(ROWS)


def test_a_failing_loss_leaves_hidden_states_to_be_asked_for():
    """transformers hangs hooks on a model that is first asked for them."""
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    ids = torch.tensor([[3, 4, 5]])

    def failing(model, batch):
        model(input_ids=batch.input_ids, output_hidden_states=True)
        raise RuntimeError("no loss today")

    with pytest.raises(ModelError, match="no loss today"):
        InfluenceEstimator(model, optimizer, REFERENCES, loss_fn=failing).score(ROWS)
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 3


@dataclass
class Weighted:
    """Callable, and not hashable."""

    factor: float

    def __call__(self, model, batch):
        return self.factor * response_loss(model, batch)


def test_any_callable_is_a_loss_and_nothing_else():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    scores = [
        InfluenceEstimator(model, optimizer, REFERENCES, loss_fn=loss, reference_loss_fn=loss).score(ROWS).loss
        for loss in (Weighted(1.0), response_loss)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-12)
    for wrong in (None, "dpo"):
        with pytest.raises(ArgumentError, match=r"loss_fn=.*: expected a function of a model and a batch"):
            InfluenceEstimator(model, optimizer, REFERENCES, loss_fn=wrong)


def test_a_loss_gets_the_rows_as_they_were_given():
    model, tokenizer = make_model("llama_tied"), make_tokenizer()
    optimizer = warm_optimizer(model)
    seen = {}

    def watched(model, batch):
        for index, row, length in zip(batch.index, batch.rows, batch.attention_mask.sum(1).tolist(), strict=True):
            kept = seen.setdefault((row["set"], index), (row, length))
            assert kept[1] == length, "never a part of a row"
            if "input_ids" in row:
                assert row["input_ids"] == batch.input_ids[batch.index.index(index), :length].tolist()
        return response_loss(model, batch)

    ids = list(range(3, 15))
    tokens = [
        {"input_ids": ids, "labels": ids, "old": [float(one) for one in ids], "note": "a note of 12", "set": "tokens"},
        {"input_ids": [*ids[:5], 0, 0], "labels": [*ids[:5], -100, -100], "attention_mask": [1] * 5 + [0] * 2,
         "old": [*map(float, ids[:5]), 0.0, 0.0], "note": "seven!!", "set": "tokens"},
    ]  # fmt: skip
    texts = [{**row, "set": "texts"} for row in make_text_rows(3, seed=1)]
    sets = {name: [{**row, "set": name} for row in make_rows(2, seed=4, longest=9)] for name in ("first", "second")}
    losses = {"loss_fn": watched, "reference_loss_fn": watched}
    estimator = InfluenceEstimator(
        model, optimizer, copy.deepcopy(sets), tokenizer=tokenizer, max_length=9, truncation="right", **losses
    )
    estimator.score(tokens)
    estimator.score(texts)
    assert {key: entry[0] for key, entry in seen.items() if key[0] in sets} == {
        (name, index): row for name, rows in sets.items() for index, row in enumerate(rows)
    }
    assert seen["tokens", 0][0] == {**tokens[0], **{key: tokens[0][key][:9] for key in ("input_ids", "labels", "old")}}
    assert seen["tokens", 1][0]["old"] == [float(one) for one in ids[:5]]
    assert [seen["texts", number][0] for number in range(3)] == texts


@pytest.mark.parametrize("method", ["exact", "anchored", "first_order"])
def test_a_reference_loss_that_rounds_more_than_a_step_is_an_error(method):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)

    def halved(model, batch):
        return response_loss(model, batch).half()

    with pytest.raises(ModelError, match=r"losses in torch.float16, .* expected float32 or float64"):
        InfluenceEstimator(model, optimizer, REFERENCES, method, reference_loss_fn=halved).score(ROWS)
    assert np.isfinite(InfluenceEstimator(model, optimizer, REFERENCES, method, loss_fn=halved).score(ROWS).loss).all()


def test_labels_are_what_the_loss_of_their_rows_takes_them_for():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    references = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 900]}]

    def classified(model, batch):
        return F.mse_loss(model(input_ids=batch.input_ids).logits[:, -1, 0], batch.labels.amax(1).double() / 900,
                          reduction="none")  # fmt: skip

    InfluenceEstimator(model, optimizer, references, reference_loss_fn=classified).score(make_rows(2))
    with pytest.raises(DataError, match="label 900 is outside the model's vocabulary"):
        InfluenceEstimator(model, optimizer, references, loss_fn=classified)
