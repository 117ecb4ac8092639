"""Texts without a chat template are encoded as TRL encodes them."""

import datasets
import pytest
import tokenizers
from encoding_support import ROW, TURNS, byte_level, encode, fault, one, runs, sentence_piece, text
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from montessori.data import Rows
from montessori.errors import ArgumentError

PAIR = {"prompt": "What is two and two?\n", "completion": "It is four."}


def ending(adds=(), **options):
    """A tokenizer with both ends of a text, which puts those of `adds` around every text itself."""
    tokenizer = byte_level("<s>", "</s>", bos_token="<s>", eos_token="</s>", **options)
    around = " ".join(["<s>"] * ("<s>" in adds) + ["$A"] + ["</s>"] * ("</s>" in adds))
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return tokenizer


def test_prompt_and_completion_stand_as_they_are_and_only_the_completion_is_labelled():
    tokenizer = ending()
    example = one(PAIR, tokenizer, chat_template="none")
    assert text(example, tokenizer) == "What is two and two?\nIt is four.</s>"
    assert runs(example, tokenizer) == ["It is four.</s>"]


def test_instruction_and_response_are_taken_like_prompt_and_completion():
    tokenizer = ending(adds=["<s>"])
    for answer in ("response", "output"):
        row = {"instruction": "Add. ", answer: "4"}
        assert text(one(row, tokenizer, chat_template="none"), tokenizer) == "<s>Add. 4</s>"
        example = one({**row, "input": "2, 2: "}, tokenizer, chat_template="none")
        assert text(example, tokenizer) == "<s>Add. \n\n2, 2: 4</s>"
        assert runs(example, tokenizer) == ["4</s>"]


def test_every_token_of_a_text_is_labelled_whatever_the_template():
    tokenizer = ending(template=None)
    row = {"text": "It is four.", "meta": 5, "labels": None}
    for options in ({}, {"chat_template": "none"}, {"chat_template": "plain"}):
        assert runs(one(row, tokenizer, **options), tokenizer) == ["It is four.</s>"]
    tokenizer = ending(adds=["<s>"], template=None)
    example = one(row, tokenizer)
    assert runs(example, tokenizer) == ["<s>It is four.</s>"]
    # Nothing predicts the first.
    assert example.num_label_tokens == example.num_tokens - 1


def test_the_end_of_a_text_is_not_written_twice():
    tokenizer = ending()
    for row in ({**PAIR, "completion": PAIR["completion"] + "</s>"}, {"text": "It is four.</s>"}):
        assert runs(one(row, tokenizer, chat_template="none"), tokenizer) == ["It is four.</s>"]


def test_texts_and_conversations_share_a_table():
    tokenizer = byte_level(eos_token="<|im_end|>")
    rows = [{**ROW, "text": None}, {"instruction": None, "response": None, "text": "Six."}, {"text": "Five."}]
    encoded = encode([*rows, {"input_ids": [5, 6], "labels": [-100, 6]}], tokenizer)
    assert [example.index for example in encoded.examples] == [0, 1, 2, 3]
    assert [runs(example, tokenizer) for example in encoded.examples[:3]] == [
        ["It is four.<|im_end|>"], ["Six.<|im_end|>"], ["Five.<|im_end|>"]
    ]  # fmt: skip


TEXTS = [
    ("What is two and two? ", "It is four."),
    ("What is two and two?", " It is four.</s>"),
    # The last token of the prompt goes on in the completion.
    ("What is tw", "o and two? It is four.\n"),
    ("user\n", "\n\nassistant"),
    ("", "It is four."),
    ("漢字 🙂", "🙂 é </s> a"),
]


@pytest.mark.parametrize(
    "tokenizer",
    [ending(), ending(["<s>"]), ending(["</s>"]), ending(["<s>", "</s>"]), sentence_piece("first", None)],
)
def test_ids_and_labels_are_those_of_trl(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    arguments = trl.SFTConfig(use_cpu=True, bf16=False, report_to=[], output_dir=str(tmp_path))
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS]
    whole = [{"text": prompt + completion} for prompt, completion in TEXTS]
    for rows in (pairs, whole):
        table = datasets.Dataset.from_list(rows)
        trainer = trl.SFTTrainer(model, arguments, train_dataset=table, processing_class=tokenizer)
        for example, expected in zip(
            encode(rows, tokenizer, chat_template="none").examples, trainer.train_dataset, strict=True
        ):
            assert example.input_ids.tolist() == expected["input_ids"]
            assert example.labels.tolist() == expected["labels"]


@pytest.mark.parametrize(
    "row", [{"messages": TURNS}, {"prompt": TURNS[:1], "completion": TURNS[1:2]}, {"conversations": TURNS}]
)
def test_messages_have_no_text_without_a_template(row):
    message = fault(Rows([PAIR, row], "data.jsonl", "line", 1), ending(), chat_template="none")
    assert message.startswith("data.jsonl, line 2: chat_template='none' takes texts as they stand, got messages")


def test_a_text_needs_an_end_a_tokenizer_and_something_in_it():
    assert "expected a tokenizer with an eos_token" in fault([{"text": "a"}], byte_level())
    assert "expected a tokenizer with an eos_token" in fault([PAIR], byte_level(), chat_template="none")
    message = fault([{"input_ids": [1], "labels": [1]}, {"text": "a"}], None, ArgumentError)
    assert message.startswith("candidates, row 1: a row of text needs tokenizer=")
    for value, says in ((" ", "expected a non-empty text"), (5, "expected a text"), ("\ud83d", "half of a surrogate")):
        assert says in fault([{"text": value}], ending())
        assert says in fault([{**PAIR, "completion": value}], ending(), chat_template="none")


def test_a_template_that_is_none_is_told_nothing():
    message = fault([PAIR], ending(), ArgumentError, chat_template="none", chat_template_kwargs={"loud": True})
    assert message.startswith("chat_template_kwargs: chat_template='none'")


def test_a_special_token_in_a_text_is_that_token():
    tokenizer = byte_level("<|im_start|>", tokenizers.AddedToken("</s>", special=True), eos_token="</s>")
    ids = one({"text": "a</s>b"}, tokenizer).input_ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 2
