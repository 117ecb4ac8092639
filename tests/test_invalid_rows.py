"""A row that is no example is an error or, if the caller wants, left out with its reason."""

import pytest
from encoding_support import (
    ASSISTANT,
    CHATML,
    MARKED,
    ROW,
    THOUGHTLESS,
    THOUGHTS,
    TURNS,
    USER,
    byte_level,
    encode,
    fault,
    runs,
)

from montessori.data import Rows
from montessori.errors import ArgumentError, DataError

TOKENS = {"input_ids": [5, 6], "labels": [-100, 6]}
INVALID = [
    ("text", "expected a dict of columns, got str"),
    ({}, "expected the columns "),
    ({"instruction": "a"}, "expected the columns "),
    ({"instruction": None, "response": "a"}, "expected a text in column instruction"),
    ({"instruction": "a", "response": None}, "expected a text in column response"),
    ({"instruction": "a", "response": None, "text": "a: b"}, "expected a text in column response"),
    ({"instruction": "a", "response": " "}, "expected a non-empty text in column response"),
    ({"text": ""}, "expected a non-empty text in column text"),
    ({"messages": [USER]}, "expected a message of the assistant"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 1 of column messages: expected a dict with role and"),
    ({"messages": [ASSISTANT, USER]}, "expected another message before the assistant's first"),
    ({"prompt": "a", "completion": "cut \ud83d"}, "column completion: character 4 is half of a surrogate pair"),
    ({"input_ids": [5, 6], "labels": [6]}, "expected input_ids, labels and attention_mask of one length"),
    ({"input_ids": [[5], [6, 7]], "labels": [6]}, "expected flat lists of token ids"),
    ({**TOKENS, "position_ids": ["a", "b"]}, "expected flat lists of integers"),
    ({**TOKENS, "token_type_ids": ["a", "b"]}, "expected flat lists of integers"),
    ({**TOKENS, "token_type_ids": [0, 1]}, "expected token_type_ids of 0 alone, got others; only text without token"),
    ({**TOKENS, "token_type_ids": [0, 0], "mm_token_type_ids": [1, 0]}, "expected mm_token_type_ids of 0 alone"),
    ({"messages": TURNS, "chat_template_kwargs": ["a"]}, "chat_template_kwargs: expected names and values"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(eos_token="<|im_end|>")


@pytest.mark.parametrize(("row", "says"), INVALID)
def test_an_invalid_row_is_an_error_unless_it_is_to_be_skipped(tokenizer, row, says):
    rows = Rows([ROW, row, TOKENS], source="data.jsonl", unit="line", first=1)
    assert fault(rows, tokenizer).startswith(f"data.jsonl, line 2: {says}")
    encoded = encode(rows, tokenizer, invalid_rows="skip")
    assert [example.index for example in encoded.examples] == [0, 2]
    assert encoded.skipped == {1: "invalid"}
    assert encoded.reasons == {1: fault(rows, tokenizer)}
    assert encoded.num_rows == 3


def test_nothing_else_changes_with_the_rows_that_are_skipped(tokenizer):
    good = [ROW, {"messages": TURNS}, {"text": "Six."}, TOKENS, {"input_ids": [5, 6], "labels": [-100, -100]}]
    rows = [row for pair in zip(good, [row for row, _ in INVALID], strict=False) for row in pair]
    encoded, alone = encode(rows, tokenizer, invalid_rows="skip"), encode(good, tokenizer, invalid_rows="skip")
    assert alone.reasons == {}
    assert [example.index for example in encoded.examples] == [0, 2, 4, 6]
    assert [example.digest() for example in encoded.examples] == [example.digest() for example in alone.examples]
    invalid = dict.fromkeys((1, 3, 5, 7, 9), "invalid")
    assert encoded.skipped == {**invalid, 8: "no_label_tokens"}
    assert list(encoded.reasons) == [*invalid]


def test_rows_of_which_none_is_valid_leave_no_example(tokenizer):
    rows = [row for row, _ in INVALID]
    encoded = encode(rows, tokenizer, invalid_rows="skip")
    assert (encoded.examples, len(encoded.skipped), encoded.num_rows) == ([], len(rows), len(rows))


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (CHATML + "{{ raise_exception('no tools') if messages[0].content == 'And?' }}", {"messages": TURNS[2:]}),
        (THOUGHTLESS, {"messages": THOUGHTS}),
        (MARKED.replace("'assistant'", "'assistant' and loop.length < 3"), {"messages": TURNS}),
    ],
)
def test_a_row_that_the_template_refuses_is_invalid(tokenizer, template, row):
    for rows in ([ROW, row, TOKENS], [TOKENS, row]):
        encoded = encode(rows, tokenizer, chat_template=template, invalid_rows="skip")
        assert encoded.skipped == {1: "invalid"}
        assert encoded.reasons[1].startswith("candidates, row 1: ")
        assert len(encoded.examples) == len(rows) - 1


@pytest.mark.parametrize(
    "template", ["{{ 1 +", "{{ raise_exception('no') }}", "{{ messages[0].a.b }}", CHATML.replace("content", "text")]
)
def test_a_template_that_fails_for_any_row_is_an_error(tokenizer, template):
    rows = [{}, ROW, {"messages": TURNS}]
    message = fault(rows, tokenizer, chat_template=template, invalid_rows="skip")
    assert message == fault(rows[1:], tokenizer, chat_template=template).replace("row 0", "row 1")


def test_what_concerns_all_rows_or_the_length_is_no_matter_of_invalid_rows(tokenizer):
    without = byte_level(template=None)
    assert "has no chat template" in fault([ROW], without, invalid_rows="skip")
    assert "expected a tokenizer with an eos_token" in fault([{"text": "a"}], without, invalid_rows="skip")
    assert "needs tokenizer=" in fault([ROW], None, ArgumentError, invalid_rows="skip")
    assert "expected at most 2 tokens" in fault([ROW], tokenizer, max_length=2, invalid_rows="skip")


def test_the_answers_of_a_conversation_do_not_suffer(tokenizer):
    (example,) = encode([{}, {"messages": TURNS}], tokenizer, invalid_rows="skip").examples
    assert runs(example, tokenizer) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


def test_another_way_to_treat_invalid_rows_is_an_argument_error(tokenizer):
    message = fault([ROW], tokenizer, ArgumentError, invalid_rows="drop")
    assert message == "invalid_rows='drop': expected one of error, skip"
    assert issubclass(ArgumentError, ValueError) and not issubclass(ArgumentError, DataError)
