"""The default loss, the reference loss with its weights, batches under a budget, and rows of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import VOCABULARY, gradients, make_model, make_rows, plain_loss, warm_optimizer
from torch import nn

from montessori import InfluenceEstimator
from montessori.batching import Example, collate, examples_from_tokens, make_batches
from montessori.coverage import verified_plan
from montessori.errors import ArgumentError, DataError, ModelError, ResourceError
from montessori.losses import response_loss
from montessori.parameters import trainable_parameters
from montessori.passes import example_losses
from montessori.referenceset import ReferenceSets


def examples(rows) -> list[Example]:
    return list(examples_from_tokens(rows, "rows"))


def of_lengths(*lengths: int) -> list[Example]:
    return [Example(torch.arange(n), torch.arange(n), i) for i, n in enumerate(lengths)]


# A label in the middle only, a hole among the labels, one label at the end, a label on the first token.
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, -100, -100, -100]},
    {"input_ids": [11, 12, 13, 14], "labels": [-100, 12, -100, 14]},
    {"input_ids": [15, 16], "labels": [-100, 16]},
    {"input_ids": [17, 18, 19, 20, 21, 22, 23], "labels": [17, 18, 19, 20, 21, 22, 23]},
    *make_rows(3, seed=5),
]
# Sums of some 10^3 products in float64, in another order when rows share a batch.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2", "opt"])
def test_response_loss_is_the_models_own_loss_of_every_row(name):
    model = make_model(name)
    got = response_loss(model, collate(examples(ROWS)))
    assert got.dtype is torch.float64
    for loss, row in zip(got, ROWS, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        # transformers computes its loss from float32 logits: some roundings of logits of size 1.
        torch.testing.assert_close(loss, model(input_ids=ids, labels=labels).loss.double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, plain_loss(model, row), **CLOSE)


def test_the_head_sees_labelled_rows_only():
    model, batch = make_model("llama_tied"), collate(examples(ROWS))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    response_loss(model, batch)
    labels = sum(example.num_label_tokens for example in examples(ROWS))
    assert seen == [(1, labels, 16)]
    assert labels < batch.num_tokens < batch.labels.numel()
    handle.remove()
    assert model(input_ids=batch.input_ids).logits.shape == (*batch.labels.shape, VOCABULARY), "it stays as it was"


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "qwen3"])
@pytest.mark.filterwarnings("error::montessori.coverage.FallbackWarning")
def test_a_head_on_labelled_rows_is_still_captured_by_a_rule(name):
    plan = verified_plan(make_model(name), examples(ROWS)[:2], response_loss)
    assert not plan.fallback


class Outputless(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids):
        return self.embed(input_ids)


class Bare(Outputless):
    """A model without a head of its own: plain logits, and a forward that takes ids only."""

    def forward(self, input_ids):
        return type("Output", (), {"logits": super().forward(input_ids)})


def test_a_model_with_logits_needs_nothing_else():
    model = Bare().double()
    got = response_loss(model, collate(examples(ROWS)))
    for loss, row in zip(got, ROWS, strict=True):
        logits = model.embed.weight[torch.tensor(row["input_ids"])][:-1]
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(row["labels"][1:])), **CLOSE)


def test_a_model_without_logits_asks_for_a_loss_function():
    with pytest.raises(ModelError, match="Outputless returned no logits: pass loss_fn="):
        response_loss(Outputless(), collate(examples(ROWS)))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses.mean(), r"one value per example \[7\], got \[\]"),
        (lambda losses: losses[:, None], r"one value per example \[7\], got \[7, 1\]"),
        (lambda losses: losses[1:], r"one value per example \[7\], got \[6\]"),
        (lambda losses: losses.tolist(), r"one value per example \[7\], got list"),
        (lambda losses: losses.detach(), "does not depend on any trainable parameter"),
    ],
)
def test_a_loss_function_that_returns_something_else_is_an_error(returned, message):
    model, batch = make_model("llama_tied"), collate(examples(ROWS))
    with pytest.raises(ModelError, match=message):
        example_losses(model, batch, lambda model, batch: returned(response_loss(model, batch)))


@pytest.mark.parametrize("which", ["loss_fn", "reference_loss_fn"])
def test_a_wrong_loss_function_is_an_error_of_the_estimator(which):
    model = make_model("llama_tied")
    wrong = {which: lambda model, batch: response_loss(model, batch).sum()}
    with pytest.raises(ModelError, match="the loss function must return one value per example"):
        InfluenceEstimator(model, warm_optimizer(model), ROWS, **wrong).score(ROWS)


# The reference loss


WEIGHTS = {
    "example_mean": lambda rows: [1 / len(rows)] * len(rows),
    "token_mean": lambda rows: [e.num_label_tokens / sum(o.num_label_tokens for o in rows) for e in rows],
}


@pytest.mark.parametrize("batch_tokens", [None, 1, 14, 1000])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_reference_loss_and_gradient_are_the_weighted_mean_whatever_the_batches(weighting, batch_tokens):
    model, parts = make_model("llama_tied"), {"one": ROWS[:4], "two": ROWS[2:]}
    sets = ReferenceSets({name: examples(rows) for name, rows in parts.items()}, weighting, batch_tokens)
    weighted = []
    for rows in parts.values():
        weights = WEIGHTS[weighting](examples(rows))
        assert sum(weights) == pytest.approx(1, rel=1e-15)
        weighted.append(sum(w * plain_loss(model, row) for w, row in zip(weights, rows, strict=True)))
    torch.testing.assert_close(sets.loss(model, response_loss), torch.stack(weighted).detach(), **CLOSE)
    q, loss = sets.gradient(model, trainable_parameters(model), response_loss)
    assert torch.equal(loss, sets.loss(model, response_loss))
    for k, loss in enumerate(weighted):
        for name, grad in gradients(model, loss).items():
            torch.testing.assert_close(q[name][k], grad, rtol=1e-10, atol=1e-14)


def test_weightings_differ_where_lengths_do():
    model = make_model("llama_tied")
    losses = [ReferenceSets({"r": examples(ROWS)}, w, 64).loss(model, response_loss) for w in WEIGHTS]
    assert abs(float(losses[0] - losses[1])) > 1e-3


def test_a_token_mean_is_the_mean_over_all_labelled_tokens():
    model, rows = make_model("llama_tied"), examples(ROWS)
    total = sum(
        loss * row.num_label_tokens for loss, row in zip(response_loss(model, collate(rows)), rows, strict=True)
    )
    want = total / sum(row.num_label_tokens for row in rows)
    got = ReferenceSets({"r": rows}, "token_mean", 20).loss(model, response_loss)
    torch.testing.assert_close(got, want.detach()[None], **CLOSE)


def test_a_reference_weighting_or_loss_that_cannot_be_used_is_refused():
    with pytest.raises(ArgumentError, match="reference_weighting='sum': expected one of example_mean, token_mean"):
        ReferenceSets({"r": examples(ROWS)}, "sum", 64)
    model = make_model("llama_tied")
    sets = ReferenceSets({"held_out": examples(ROWS)}, "example_mean", None)

    def broken(model, batch):
        return response_loss(model, batch) * torch.tensor([float("nan") if i == 3 else 1.0 for i in batch.index])

    for use in (lambda: sets.loss(model, broken), lambda: sets.gradient(model, trainable_parameters(model), broken)):
        with pytest.raises(ModelError, match="reference held_out row 3: its loss is nan, expected a finite number"):
            use()
    assert sets.loss(model, broken, require_finite=False).isnan().all()


# Batches


@pytest.mark.parametrize("budget", [9, 10, 17, 30, 1000])
def test_batches_hold_every_example_once_within_the_budget(budget):
    lengths = [3, 9, 1, 4, 4, 9, 2, 7, 1, 1, 5]
    rows = of_lengths(*lengths)
    batches = make_batches(rows, budget)
    assert sorted(example.index for batch in batches for example in batch) == list(range(len(rows)))
    sizes = [(len(batch), max(example.num_tokens for example in batch)) for batch in batches]
    assert all(count * longest <= budget for count, longest in sizes)
    assert [longest for _, longest in sizes] == sorted((longest for _, longest in sizes), reverse=True)
    if budget == 1000:
        assert len(batches) == 1
    backwards = make_batches(rows[::-1], budget)
    assert [[e.index for e in batch] for batch in backwards] == [[e.index for e in batch] for batch in batches]


def test_no_example_gives_no_batch():
    assert make_batches([], 8) == []


def test_a_batch_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ResourceError, match="held_out row 1 has 9 tokens, more than batch_tokens=8"):
        make_batches(of_lengths(8, 9, 3), 8, "held_out")
    with pytest.raises(ArgumentError, match="batch_tokens=0: expected a positive number"):
        make_batches(of_lengths(1), 0)


def test_collate_pads_on_the_right_and_marks_what_is_real():
    batch = collate(examples(ROWS[:3]))
    assert (batch.size, batch.num_tokens, batch.index) == (3, 12, (0, 1, 2))
    for i, row in enumerate(ROWS[:3]):
        length = len(row["input_ids"])
        assert batch.input_ids[i].tolist() == row["input_ids"] + [0] * (6 - length)
        assert batch.labels[i].tolist() == row["labels"] + [-100] * (6 - length)
        assert batch.attention_mask[i].tolist() == [1] * length + [0] * (6 - length)


# Rows of tokens


@pytest.mark.parametrize("as_type", [list, torch.tensor, lambda values: torch.tensor(values, dtype=torch.int32)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 3), (2, 3)])
def test_padding_on_either_side_is_cut_off(left, right, as_type):
    row = {
        "input_ids": [9] * left + [5, 6, 7] + [9] * right,
        "labels": [-100] * left + [-100, 6, 7] + [-100] * right,
        "attention_mask": [0] * left + [1, 1, 1] + [0] * right,
    }
    (example,) = examples_from_tokens([{key: as_type(values) for key, values in row.items()}], "rows")
    assert (example.input_ids.tolist(), example.labels.tolist()) == ([5, 6, 7], [-100, 6, 7])
    assert (example.input_ids.dtype, example.labels.dtype) == (torch.int64, torch.int64)
    assert (example.index, example.num_tokens, example.num_label_tokens) == (0, 3, 2)


def test_a_label_on_the_first_token_does_not_count():
    (example,) = examples_from_tokens([{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}], "rows")
    assert example.num_label_tokens == 1


GOOD = {"input_ids": [1, 2], "labels": [1, 2]}
BAD_ROWS = {
    "no_labels": ({"input_ids": [1, 2]}, "expected columns input_ids and labels, 'labels' is missing"),
    "lengths": ({**GOOD, "labels": [1]}, r"of one length, got shapes \[2\], \[1\] and \[2\]"),
    "mask_length": ({**GOOD, "attention_mask": [1]}, r"of one length, got shapes \[2\], \[2\] and \[1\]"),
    "nested": ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, r"got shapes \[1, 2\], \[1, 2\]"),
    "ragged": ({"input_ids": [[1], [1, 2]], "labels": [1, 2]}, "expected flat lists of token ids"),
    "text": ({"input_ids": "ab", "labels": [1, 2]}, "expected flat lists of token ids"),
    "float": ({"input_ids": [1.0, 2.0], "labels": [1, 2]}, "expected integer input_ids, got torch.float32"),
    "empty": ({"input_ids": [], "labels": []}, "no token"),
    "all_padding": ({**GOOD, "attention_mask": [0, 0]}, "no token"),
    "half_masked": ({**GOOD, "attention_mask": [1, 0.5]}, "expected attention_mask of 0 and 1, got other values"),
    "hole": ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask has a hole"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(row, message):
    with pytest.raises(DataError, match=message) as error:
        list(examples_from_tokens([GOOD, row], "candidates"))
    assert str(error.value).startswith("candidates row 1: ")
    assert "\n" not in str(error.value)


def test_a_full_batch_is_closed_before_it_is_mostly_padding():
    lengths = [400] * 4 + [100] * 12
    batches = make_batches(of_lengths(*lengths), 8192)
    assert [len(batch) for batch in batches] == [4, 12]
    # Few tokens go together all the same.
    assert len(make_batches(of_lengths(400, 100, 20), 8192)) == 1
