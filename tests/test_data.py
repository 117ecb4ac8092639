"""Every kind of source gives the same rows, and every error about a row names the file and the line."""

import json
from pathlib import Path

import datasets
import numpy
import pandas
import pyarrow
import pytest
import torch
from data_support import LINES, ROWS, fault, written

from montessori.data import Rows, column_set, is_row, load_rows, read_chat
from montessori.errors import ArgumentError, DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TURNS = [USER, ASSISTANT]
TEXT_PART = {"type": "text", "text": "i"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.fixture
def no_hub(monkeypatch):
    def load_dataset(name, split):
        pytest.fail(f"asked the hub for {name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


# Directories and the hub.


def test_a_saved_dataset_gives_its_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    rows = load_rows(tmp_path / "saved")
    assert list(rows) == ROWS
    assert rows.where(1) == "saved, row 1"


def test_a_split_is_taken_from_a_saved_dataset_dict(tmp_path):
    parts = {"train": ROWS[:1], "test": ROWS[1:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    for source in (str(tmp_path / "saved"), saved):
        assert list(load_rows(source)) == ROWS[:1]
        assert list(load_rows(source, split="test")) == ROWS[1:]
        assert "expected a split 'dev', got the splits train, test; choose one: data" in fault(source, split="dev")


def test_the_error_about_a_split_says_code_that_works(tmp_path):
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(tmp_path / "saved")
    for source, named in ((saved, {"dataset": saved}), (tmp_path / "saved", {"datasets": datasets})):
        code = fault(source).partition("choose one: ")[2]
        assert list(load_rows(eval(code, named))) == ROWS


def test_a_saved_dataset_that_is_damaged_is_not_read_as_a_folder_of_files(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (tmp_path / "state.json").unlink()
    written(tmp_path / "data.jsonl", LINES)
    assert fault(tmp_path).startswith(f"{tmp_path}: expected a directory written by datasets.save_to_disk")


def test_a_name_that_is_no_path_is_loaded_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/name", split="test")
    assert asked == [("owner/name", "test")]
    assert list(rows) == ROWS
    assert rows.where(1) == "owner/name, row 1"


@pytest.mark.parametrize("raised", [datasets.exceptions.DatasetNotFoundError, ValueError, Exception])
def test_a_name_that_cannot_be_loaded_is_one_helpful_line(monkeypatch, raised):
    def load_dataset(name, split):
        raise raised("no such\ndataset")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = fault("owner/name")
    expected = ("'owner/name'", "no such path", "split 'train'", raised.__name__, "no such dataset", ".jsonl")
    assert all(part in message for part in expected)


@pytest.mark.parametrize(
    "name",
    [
        "data.jsonl", "data.json", "data.csv.gz", "owner/data.parquet", "./name", "a/b/c", "/nowhere/name", "~/nowhere",
        "~nobody/name", "What is 2 + 2?", "a\nb", "a b", "long " * 9999, "",
    ],
)  # fmt: skip
def test_a_mistyped_path_is_not_sought_on_the_hub(no_hub, name):
    message = fault(name)
    assert "no such file" in message or "expected .jsonl" in message
    assert len(message) < 500


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "data.jsonl", LINES)
    for source in ("~/data.jsonl", Path("~/data.jsonl")):
        assert list(load_rows(source)) == ROWS


def test_a_missing_path_object_is_not_sought_on_the_hub(tmp_path, no_hub):
    assert "no such file" in fault(tmp_path / "name")


# Memory.


def test_a_dataset_gives_plain_rows_whatever_its_format():
    dataset = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    assert list(load_rows(dataset.with_format("numpy"))) == [{"input_ids": [1, 2], "labels": [-100, 2]}]
    assert list(load_rows(datasets.Dataset.from_list(ROWS).select([1]))) == ROWS[1:]


def test_a_dataframe_gives_plain_rows_by_position():
    ragged = numpy.array([numpy.array([1, 2]), numpy.array([3])], dtype=object)
    frame = pandas.DataFrame(
        {
            "response": ["a", "b"],
            "input": ["c", None],
            "messages": [numpy.array(TURNS, dtype=object), TURNS],
            "input_ids": [numpy.array([1, 2]), (3, 4)],
            "parts": [ragged, None],
        },
        index=[5, 9],
    )
    rows = load_rows(frame, name="reference")
    assert list(rows) == [
        {"response": "a", "input": "c", "messages": TURNS, "input_ids": [1, 2], "parts": [[1, 2], [3]]},
        {"response": "b", "input": None, "messages": TURNS, "input_ids": [3, 4], "parts": None},
    ]
    assert type(rows[0]["messages"]) is list
    assert rows.where(1) == "reference, row 1"


def test_a_table_of_pyarrow_gives_plain_rows():
    table = pyarrow.Table.from_pylist([{"messages": TURNS, "id": 7}, {"messages": [{**USER, "name": "me"}, ASSISTANT]}])
    rows = load_rows(table, name="reference")
    assert list(rows) == [
        {"messages": TURNS, "id": 7},
        {"messages": [{**USER, "name": "me"}, ASSISTANT], "id": None},
    ]
    assert rows.where(1) == "reference, row 1"


def test_an_iterable_of_dicts_gives_its_rows():
    assert list(load_rows(ROWS)) == list(load_rows(row for row in ROWS)) == ROWS
    assert load_rows(ROWS).where(1) == "candidates, row 1"
    assert load_rows(ROWS, name="reference").where(1) == "reference, row 1"


def test_an_iterable_of_something_else_is_an_error():
    assert fault([*ROWS, "text"]) == "candidates, row 2: expected a dict, got str"


@pytest.mark.parametrize("source", [[], pandas.DataFrame(), datasets.Dataset.from_list([])])
def test_a_source_without_rows_is_an_error(source):
    assert fault(source, name="reference").startswith("reference: expected at least one row")


@pytest.mark.parametrize("source", [None, 5, b"data.jsonl", {"response": ["a"]}])
def test_another_type_is_an_argument_error(source):
    message = fault(source, error=ArgumentError)
    assert "expected a path" in message
    assert message.endswith(f"got {type(source).__name__}")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"prompt": "hi", "completion": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"conversations": []},
        {"input_ids": [1], "labels": [1]},
        {"text": "hi"},
    ],
)
def test_a_single_row_is_to_be_wrapped_in_a_list(no_hub, row):
    message = fault(row, error=ArgumentError, name="reference")
    assert message.startswith(f"reference: expected a list of rows, got one dict with the columns {', '.join(row)}; ")
    assert "wrap the row in a list, [row]" in message


def test_rows_are_a_sequence_and_are_returned_as_they_are():
    rows = Rows(ROWS, source="reference")
    assert load_rows(rows, name="candidates") is rows
    assert (len(rows), rows[-1], rows[:1], ROWS[1] in rows) == (2, ROWS[1], ROWS[:1], True)
    with pytest.raises(AttributeError):
        rows.source = "candidates"


def test_what_a_table_fills_in_is_not_told_to_the_template(tmp_path):
    def call(**arguments):
        return {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}

    schemas = [[{"name": "add", "parameters": {"a": "int"}}], [{"name": "add", "parameters": {"b": ["x", None]}}]]
    rows = [
        {"messages": [USER, call(a=2)], "tools": schemas[0], "chat_template_kwargs": {"loud": True}},
        {"messages": [{**USER, "name": "me"}, call(b="two")], "tools": schemas[1], "chat_template_kwargs": {"low": 1}},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    sources = [tmp_path / "rows.jsonl", tmp_path / "rows.parquet", tmp_path / "saved", table, frame]
    for source in sources:
        assert list(load_rows(source)) == rows


# Columns.


def chat(row):
    return read_chat(row, column_set(row, "data.jsonl, line 2"), 1, "data.jsonl, line 2")


def malformed(row):
    with pytest.raises(DataError) as caught:
        chat(row)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.jsonl, line 2: ")
    return str(caught.value).removeprefix("data.jsonl, line 2: ")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "response": "hello"},
        {"instruction": "hi", "input": None, "response": "hello", "prompt": "another"},
        {"instruction": "hi", "input": " \n", "response": "hello", "messages": None},
        {"prompt": "hi", "completion": "hello", "input": "another"},
        {"messages": TURNS, "prompt": "another", "completion": "another", "input_ids": [1], "labels": None},
        {"instruction": "hi", "input": "", "output": "hello", "text": "another"},
        {"instruction": "hi", "output": "another", "response": "hello"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}], "messages": None},
        {"conversations": TURNS, "instruction": "another", "output": "another"},
        {"messages": [{"from": "human", "value": "hi"}, ASSISTANT]},
    ],
)
def test_every_set_of_columns_is_a_conversation(row):
    read = chat(row)
    assert (read.index, read.where, read.messages) == (1, "data.jsonl, line 2", TURNS)
    assert read.first_labelled == 0


def test_parts_of_a_content_stay_apart_and_hold_nothing_but_text():
    parts = [{"type": "text", "text": "h", "image": None}, TEXT_PART]
    read = chat({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert read.messages == [{"role": "user", "content": [{"type": "text", "text": "h"}, TEXT_PART]}, ASSISTANT]


def test_input_follows_the_instruction_after_a_blank_line():
    row = {"instruction": "Add.", "input": "2, 2", "response": "4"}
    assert chat(row).messages[0] == {"role": "user", "content": "Add.\n\n2, 2"}


def test_messages_of_a_prompt_come_before_those_that_are_labelled():
    read = chat({"prompt": [*TURNS, USER], "completion": [ASSISTANT]})
    assert (read.messages, read.first_labelled) == ([*TURNS, *TURNS], 3)


def test_token_ids_come_before_text():
    row = {"messages": TURNS, "input_ids": [1], "labels": [1]}
    assert column_set(row, "data.jsonl, line 2") == ("input_ids", "labels")


@pytest.mark.parametrize("call", [{}, {"function": {}}, {"function": "add"}, "add", {"name": ""}])
def test_a_call_without_the_name_of_a_function_is_an_error(call):
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    message = malformed({"messages": [USER, answer]})
    assert message.startswith("message 1 of column messages: expected tool_calls, each with the name of a function")


@pytest.mark.parametrize("tools", ["[{", ["add"], {"name": "add"}, "[1]"])
def test_tools_that_are_no_list_of_schemas_are_an_error(tools):
    assert "in column tools" in malformed({"messages": TURNS, "tools": tools})


def test_missing_columns_are_named():
    message = malformed({"instruction": "a", "answer": "b"})
    expected = (
        "input_ids + labels or messages or prompt + completion or instruction + response or conversations or "
        "instruction + output or text"
    )
    assert message == f"expected the columns {expected}, got instruction, answer"
    assert malformed({}).endswith("got none")
    assert malformed("text") == "expected a dict of columns, got str"


@pytest.mark.parametrize("answer", ["", " \n\t", None, 5, ["a"], torch.zeros(3, 3)])
@pytest.mark.parametrize("columns", [("instruction", "response"), ("prompt", "completion"), ("instruction", "output")])
def test_an_empty_response_is_an_error(columns, answer):
    assert malformed(dict(zip(columns, ("question", answer), strict=True))).startswith("expected a ")


@pytest.mark.parametrize("columns", [{"instruction": None}, {"instruction": 5}, {"input": 5}])
def test_a_question_that_is_no_text_is_an_error(columns):
    (column,) = columns
    message = malformed({"instruction": "a", "response": "b", **columns})
    assert message == f"expected a text in column {column}, got {columns[column]}"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "expected a message of the assistant in column messages"),
        ([USER], "expected a message of the assistant in column messages"),
        ("text", "expected a list of messages in column messages, got 'text'"),
        ([USER, "text"], "message 1 of column messages: expected a dict with role and content"),
        (
            [USER, {"role": "assistant"}],
            "message 1 of column messages: expected a dict with role and content",
        ),
        ([{**USER, "role": "bot"}], "message 0 of column messages: expected a role of system, "),
        ([{**USER, "role": ["user"]}], "message 0 of column messages: expected a role of system, "),
        ([USER, {**ASSISTANT, "content": None}], "message 1 of column messages: expected a text as content"),
        ([{**USER, "content": ["a"]}], "message 0 of column messages: expected a text as content"),
        (
            [{**USER, "content": [TEXT_PART, IMAGE_PART]}],
            "message 0 of column messages: expected a text as content, or",
        ),
        ([{**USER, "content": [{"type": "text"}]}], "message 0 of column messages: expected a text as content, or"),
        ([USER, {**ASSISTANT, "content": []}], "message 1 of column messages: expected a non-empty answer"),
        ([{"from": "function_call", "value": "a"}], "message 0 of column messages: expected from to be one of human, "),
        ([{"from": ["human"], "value": "a"}], "message 0 of column messages: expected from to be one of human, "),
        ([{"from": "human"}], "message 0 of column messages: expected a dict with role and content"),
        ([{"from": "human", "value": None}], "message 0 of column messages: expected a text as content, got None"),
        ([USER, {**ASSISTANT, "content": " "}], "message 1 of column messages: expected a non-empty answer"),
    ],
)
def test_malformed_messages_are_errors(messages, says):
    assert malformed({"messages": messages}).startswith(says)


def test_a_prompt_and_a_completion_are_both_texts_or_both_messages():
    for row in ({"prompt": [USER], "completion": "a"}, {"prompt": "a", "completion": [ASSISTANT]}):
        assert "expected a list of messages" in malformed(row)
    message = malformed({"prompt": TURNS, "completion": [USER]})
    assert message == "expected a message of the assistant in column completion, got none"


def test_speakers_of_sharegpt_have_the_roles_that_templates_know():
    speakers = ("system", "human", "gpt", "observation", "tool", "chatgpt")
    row = {"conversations": [{"from": speaker, "value": "a", "weight": 1} for speaker in speakers]}
    read = chat(row).messages
    assert [message["role"] for message in read] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert all(message == {"role": message["role"], "content": "a", "weight": 1} for message in read)
    assert row["conversations"][0] == {"from": "system", "value": "a", "weight": 1}


def test_a_text_counts_where_no_other_set_of_columns_has_a_value():
    where = "data.jsonl, line 2"
    for row in ({"text": "a"}, {"text": "a", "label": 1}, {"text": "a", "messages": None}, {"text": None}):
        assert column_set(row, where) == ("text",)
    for columns in (("instruction", "response"), ("prompt", "completion")):
        row = {columns[0]: "a", columns[1]: None, "text": "a"}
        assert column_set(row, where) == columns
        assert malformed(row).startswith(f"expected a text in column {columns[1]}")
    assert malformed({"text": "a"}) == "expected a conversation, got a text alone in column text"


@pytest.mark.parametrize(
    ("source", "one"),
    [
        ({"prompt": "a", "completion": "b"}, True),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, True),
        ({"conversations": [{"from": "human", "value": "a"}]}, True),
        ({"input_ids": [1, 2], "labels": [1, 2]}, True),
        ({"messages": [{"prompt": "a", "completion": "b"}]}, False),
        ({"prompt": [{"messages": []}], "completion": [{"instruction": "a", "response": "b"}]}, False),
        ({"train": [{"prompt": "a", "completion": "b"}]}, False),
    ],
)
def test_sets_may_be_called_as_columns_are(source, one):
    assert is_row(source) is one
