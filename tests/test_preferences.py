"""Preference pairs: the tokens and the loss of TRL's DPOTrainer, and influence by it as real steps have it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import CHATML, make_model, make_rows, make_tokenizer, warm_optimizer

from montessori import InfluenceEstimator, ScoreJournal
from montessori.batching import collate, examples_from_tokens, with_row
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError, ModelError, StateError
from montessori.losses import response_logprobs
from montessori.preferences import DPO, encode_pairs, with_reference_margins

QUESTION = {"role": "user", "content": "what is red"}
TEXTS = {"prompt": "what is red", "chosen": " a colour", "rejected": " add two and three"}
# It ends with the turn's last special token: TRL labels what a template writes after it.
TEMPLATE = CHATML.replace("<|im_end|> \n ", "<|im_end|>")


def said(text):
    return {"role": "assistant", "content": text}


def token_pairs(count, seed=0):
    """Rows of `encode_pairs` with random tokens, chosen and rejected of unlike lengths."""
    chosen, rejected = make_rows(count, seed=seed), make_rows(count, seed=seed + 100)[::-1]
    both = enumerate(zip(chosen, rejected, strict=True))
    return [{**one, "rejected": other, "id": number} for number, (one, other) in both]


def batch_of(pairs):
    return collate([with_row(one, row) for one, row in zip(examples_from_tokens(pairs, "pairs"), pairs, strict=True)])


def sequence_logprob(model, row):
    """log π of the labelled tokens of one row, by the definition."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    counted = labels != -100
    return logprobs[counted, labels[counted]].sum()


def slow_dpo(model, reference, row, beta):
    margins = [sequence_logprob(one, row) - sequence_logprob(one, row["rejected"]) for one in (model, reference)]
    return -F.logsigmoid(beta * (margins[0] - margins[1].detach()))


def test_the_loss_is_that_of_the_definition():
    model, reference = make_model("llama_tied"), make_model("llama_untied")
    pairs = with_reference_margins(token_pairs(5), reference, batch_tokens=40)
    got = DPO(0.3)(model, batch_of(pairs))
    want = torch.stack([slow_dpo(model, reference, row, 0.3) for row in pairs])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert [row["id"] for row in pairs] == list(range(5))


@pytest.mark.filterwarnings("error::montessori.errors.FallbackWarning")
@pytest.mark.parametrize("method", ["exact", "anchored", "first_order"])
def test_influence_of_pairs_on_pairs_is_that_of_single_steps(method):
    """A step on each pair alone, by torch's own optimizer."""
    model, reference_model = make_model("llama_tied"), make_model("llama_untied")
    optimizer = warm_optimizer(model)
    pairs, held_out = (with_reference_margins(token_pairs(n, seed), reference_model) for n, seed in ((4, 1), (3, 2)))
    loss, settings = DPO(0.3), {"method": method, "loss_fn": DPO(0.3), "reference_loss_fn": DPO(0.3)}
    got = InfluenceEstimator(model, optimizer, held_out, **settings).score(pairs)
    with torch.no_grad():
        before = loss(model, batch_of(held_out)).mean()
    want = []
    for row in pairs:
        stepped, its_optimizer = copy.deepcopy((model, optimizer))
        loss(stepped, batch_of([row])).sum().backward()
        its_optimizer.step()
        with torch.no_grad():
            want.append(float(before - loss(stepped, batch_of(held_out)).mean()))
    if method == "exact":
        np.testing.assert_allclose(got.influence, want, rtol=1e-9)
    else:
        # Steps of 1e-3 bend the loss.
        assert np.corrcoef(got.influence, want)[0, 1] > 0.98


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt2"])
def test_logprobs_of_a_batch_are_those_of_single_rows(name):
    model, rows = make_model(name), make_rows(5, seed=3)
    want = torch.stack([sequence_logprob(model, row) for row in rows])
    batch = collate(list(examples_from_tokens(rows, "rows")))
    torch.testing.assert_close(response_logprobs(model, batch), want, rtol=1e-12, atol=0)


def test_padding_and_what_is_no_token_are_those_of_other_rows():
    model, pairs = make_model("llama_tied"), token_pairs(3)

    def padded(row):
        return {"input_ids": [0, 0, *row["input_ids"]], "labels": [-100, -100, *row["labels"]],
                "attention_mask": [0, 0, *[1] * len(row["labels"])]}  # fmt: skip

    wide = [{**padded(pair), "rejected": padded(pair["rejected"])} for pair in pairs]
    want, got = (with_reference_margins(rows, model) for rows in (pairs, iter(wide)))
    assert [row["reference_margin"] for row in got] == pytest.approx([row["reference_margin"] for row in want])
    torch.testing.assert_close(DPO()(model, batch_of(got)), DPO()(model, batch_of(want)))
    assert with_reference_margins([], model) == []
    empty = {"input_ids": [1, 2], "labels": [-100, -100]}
    wrong = [
        ({"input_ids": [1.0], "labels": [1]}, "integer input_ids"),
        (empty, "a label"),
        ("a", "expected input_ids"),
    ]
    for rejected, words in wrong:
        with pytest.raises(DataError, match=words):
            with_reference_margins([{**pairs[0], "rejected": rejected}], model)
    long = {"input_ids": [1] * 99, "labels": [1] * 99}
    with pytest.raises(ArgumentError, match="positions"):
        with_reference_margins([{**pairs[0], "rejected": long}], make_model("gpt2"))


def test_a_journal_is_of_one_loss(tmp_path):
    model = make_model("llama_tied")
    optimizer, pairs = warm_optimizer(model), with_reference_margins(token_pairs(4), make_model("llama_untied"))

    def score(beta):
        estimator = InfluenceEstimator(model, optimizer, make_rows(3), method="first_order", loss_fn=DPO(beta))
        return estimator.score(pairs, journal=ScoreJournal(tmp_path / "journal"))

    score(0.3)
    with pytest.raises(StateError, match="other loss"):
        score(0.9)


@pytest.mark.parametrize("template", ["none", TEMPLATE])
def test_tokens_and_loss_are_those_of_trl(template, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    tokenizer = make_tokenizer()
    rows = [TEXTS, {"prompt": "say hello", "chosen": " hello red", "rejected": " two"}]
    if template == "none":
        # One of which goes on within a word of the prompt.
        rows.append({"prompt": "say r", "chosen": "ed two", "rejected": " two"})
    if template != "none":
        tokenizer.chat_template = template
        rows = [
            {"prompt": [{"role": "user", "content": row["prompt"]}],
             **{side: [said(row[side].strip())] for side in ("chosen", "rejected")}}
            for row in rows
        ]  # fmt: skip
    model, reference = make_model("llama_untied", torch.float32), make_model("llama_tied", torch.float32)
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=0.3, max_length=None, use_cpu=True, bf16=False, report_to="none",
            per_device_train_batch_size=3, gradient_checkpointing=False, seed=0, data_seed=0,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    pairs = encode_pairs(rows, tokenizer, chat_template=template)
    for theirs, ours in zip(trainer.train_dataset, pairs, strict=True):
        for side, row in (("chosen", ours), ("rejected", ours["rejected"])):
            assert theirs["prompt_ids"] + theirs[f"{side}_ids"] == row["input_ids"]
            counted = len(theirs["prompt_ids"])
            assert row["labels"][:counted] == [-100] * counted and row["labels"][counted:] == row["input_ids"][counted:]
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        want = trainer.compute_loss(trainer.model, inputs)
        got = DPO(0.3)(model, batch_of(with_reference_margins(pairs, reference)))
    torch.testing.assert_close(got.mean().float(), want.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [QUESTION], "chosen": [said("a colour")], "rejected": [said("two")]},
        {"chosen": [QUESTION, said("a colour")], "rejected": [QUESTION, said("two")]},
        # The prompt once more: in both, or as a text, as UltraFeedback has it.
        {"prompt": [QUESTION], "chosen": [QUESTION, said("a colour")], "rejected": [QUESTION, said("two")]},
        {"prompt": "what is red", "chosen": [QUESTION, said("a colour")], "rejected": [QUESTION, said("two")]},
        {"prompt": "what is red", "chosen": "a colour", "rejected": "two"},
        {"prompt": "what is red", "chosen": [said("a colour")], "rejected": [said("two")]},
        {"prompt": [QUESTION], "chosen": "a colour", "rejected": "two"},
        {"question": "what is red", "chosen": "a colour", "rejected": "two"},
        {"instruction": "what is red", "chosen": "a colour", "rejected": "two"},
        # Fields that a table fills.
        {"chosen": [{**QUESTION, "tool_calls": None}, said("a colour")], "rejected": [QUESTION, said("two")]},
    ],
)
def test_all_forms_of_a_pair_have_the_tokens_of_its_answers(row):
    tokenizer = make_tokenizer()
    beside = {"score": 3, "messages": [QUESTION, said("red")]}
    (pair,) = encode_pairs([{**row, **beside}], tokenizer)
    for text, found in (("a colour", pair), ("two", pair["rejected"])):
        (one,) = encode_rows([{"instruction": "what is red", "response": text}], tokenizer, max_length=99).examples
        assert found["input_ids"] == one.input_ids.tolist() and found["labels"] == one.labels.tolist()
    kept = {*row} - {"prompt", "chosen", "rejected"}
    assert pair.keys() == {"input_ids", "labels", "rejected", *beside, *kept} and pair["score"] == 3


def test_a_system_prompt_beside_a_pair_is_read():
    tokenizer, row = make_tokenizer(), {"prompt": "what is red", "chosen": "a colour", "rejected": "two"}
    (pair,) = encode_pairs([{**row, "system": "say two", "attention_mask": [1]}], tokenizer)
    (plain,) = encode_pairs([row], tokenizer)
    assert len(pair["input_ids"]) > len(plain["input_ids"])
    assert len(pair["rejected"]["input_ids"]) > len(plain["rejected"]["input_ids"])


def test_a_prompt_of_texts_is_what_they_begin_with(tmp_path):
    row = {"chosen": "Human: what Assistant: red two", "rejected": "Human: what Assistant: red three"}
    (pair,) = encode_pairs([row], make_tokenizer(), chat_template="none")
    assert [i for i, label in enumerate(pair["labels"]) if label == -100] == list(range(len(pair["labels"]) - 2))


BAD = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "row 1: expected columns chosen and rejected"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": ""}, "expected columns chosen and rejected, both filled"),
    "alike": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "expected chosen and rejected to differ"),
    "of two kinds": ({"prompt": "a", "chosen": "b", "rejected": [said("c")]}, "two texts or two lists of"),
    "no prompt": ({"chosen": "b c", "rejected": "b d"}, "expected a prompt; texts that begin with theirs need"),
    "nothing alike": ({"chosen": [said("b")], "rejected": [said("c")]}, "expected a prompt, or chosen and rejected"),
    "one the other's beginning": ({"chosen": [QUESTION, said("b")], "rejected": [QUESTION]}, "and go on otherwise"),
    "blank": ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected stands in the place of completion"),
    "too long": ({"prompt": "a " * 40, "chosen": "b", "rejected": "c"}, "pairs, row 1: expected at most 30"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_row_that_is_no_pair_is_named(row, message):
    with pytest.raises(DataError, match=message) as caught:
        encode_pairs([TEXTS, row], make_tokenizer(), max_length=30)
    assert "\n" not in str(caught.value)


def test_a_pair_that_is_cut_to_the_same_tokens_is_refused():
    row = {"prompt": "what is", "chosen": "the capital of france a", "rejected": "the capital of france red"}
    cut = {"max_length": 11, "truncation": "right"}
    with pytest.raises(DataError, match=r"pairs, row 1: .* the same 11 tokens; they differ beyond max_length"):
        encode_pairs([TEXTS, row], make_tokenizer(), **cut)
    assert len(encode_pairs([TEXTS, row], make_tokenizer(), **cut | {"max_length": 12})) == 2


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ArgumentError, match="truncation='skip': expected 'error' or 'right'"):
        encode_pairs([TEXTS], make_tokenizer(), truncation="skip")
    for beta in (0, "0.1", None, float("inf")):
        with pytest.raises(ArgumentError, match=r"beta=.*: expected a number above 0"):
            DPO(beta)
    model = make_model("llama_tied")
    with pytest.raises((DataError, ModelError), match="expected reference_margin, as encode_pairs and with_reference"):
        InfluenceEstimator(model, warm_optimizer(model), make_rows(3), loss_fn=DPO()).score(token_pairs(2))
