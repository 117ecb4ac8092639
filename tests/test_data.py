"""Every kind of source gives the same rows, and every error about a row names the file and the line."""

import json

import datasets
import numpy
import pandas
import pytest
import torch

from montessori.data import Rows, column_set, load_rows, read_chat
from montessori.errors import ArgumentError, DataError

ROWS = [{"instruction": "Say hi", "response": "hi"}, {"instruction": "Naïve?", "response": "oui"}]
LINES = b'{"instruction": "Say hi", "response": "hi"}\n{"instruction": "Na\xc3\xafve?", "response": "oui"}\n'
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TURNS = [USER, ASSISTANT]


def fault(source, error=DataError, **options):
    """The message of the error, checked to be one line."""
    with pytest.raises(error) as caught:
        load_rows(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture
def no_hub(monkeypatch):
    def load_dataset(name, split):
        pytest.fail(f"asked the hub for {name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


# JSONL.


@pytest.mark.parametrize("content", [LINES, LINES.rstrip(b"\n"), LINES.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("suffix", [".jsonl", ".json-lines"])
def test_jsonl_gives_its_rows_with_or_without_a_final_newline(tmp_path, content, suffix):
    path = written(tmp_path / f"data{suffix}", content)
    for source in (path, str(path)):
        rows = load_rows(source)
        assert list(rows) == ROWS
        assert rows.source == f"data{suffix}"
        assert [rows.where(0), rows.where(12)] == [f"data{suffix}, line 1", f"data{suffix}, line 13"]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    text = '{"response": "a\u2028b\x85c"}\n{"response": 1'
    assert "data.jsonl, line 2" in fault(written(tmp_path / "data.jsonl", text.encode()))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "the line is empty"),
        (b"  \t", "the line is empty"),
        (b'{"response": "a"', "malformed JSON"),
        (b'{"a": 1} {"b": 2}', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"response": "caf\xe9"}', "expected UTF-8, byte 17 of the line is 0xe9"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, says):
    message = fault(written(tmp_path / "data.jsonl", b'{"a": 1}\n' + line + b'\n{"b": 2}\n'))
    assert message.startswith("data.jsonl, line 2: ")
    assert says in message


def test_an_empty_file_is_an_error(tmp_path):
    assert fault(written(tmp_path / "data.jsonl", b"")) == (
        "data.jsonl: expected at least one row, the source is empty"
    )


# Other files.


def test_parquet_gives_plain_rows_counted_from_zero(tmp_path):
    path = tmp_path / "data.parquet"
    pandas.DataFrame({"messages": [TURNS, TURNS], "id": [7, 8]}).to_parquet(path)
    rows = load_rows(path)
    assert list(rows) == [{"messages": TURNS, "id": 7}, {"messages": TURNS, "id": 8}]
    assert rows.where(12) == "data.parquet, row 12"


def test_parquet_errors_name_the_file(tmp_path):
    assert "expected a Parquet file" in fault(written(tmp_path / "data.parquet", b"no parquet"))
    pandas.DataFrame({"response": []}).to_parquet(tmp_path / "none.parquet")
    assert fault(tmp_path / "none.parquet").startswith("none.parquet: expected at least one row")


@pytest.mark.parametrize("name", ["data.json", "data.csv", "data", "data.jsonl.gz"])
def test_another_extension_is_an_error_that_says_what_is_supported(tmp_path, no_hub, name):
    message = fault(written(tmp_path / name, LINES))
    assert all(kind in message for kind in (name, ".jsonl", ".parquet", "save_to_disk"))


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path / name, LINES)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("pyarrow.parquet.read_table", refuse)
    assert f"{path}: cannot be read ([Errno 13] Permission denied)" in fault(path)


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
        assert "expected a split 'dev', got the splits train, test" in fault(source, split="dev")


def test_another_directory_is_an_error(tmp_path, no_hub):
    written(tmp_path / "data.jsonl", LINES)
    message = fault(tmp_path)
    assert message.startswith(f"{tmp_path}: expected a directory written by datasets.save_to_disk")


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


@pytest.mark.parametrize("name", ["data.jsonl", "owner/data.parquet", "./name", "a/b/c", "/nowhere/name"])
def test_a_mistyped_path_is_not_sought_on_the_hub(no_hub, name):
    assert "no such file" in fault(name)


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
    ],
)
def test_every_set_of_columns_is_a_conversation(row):
    read = chat(row)
    assert (read.index, read.where, read.messages) == (1, "data.jsonl, line 2", TURNS)
    assert read.first_labelled == 0


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
    expected = "input_ids + labels or messages or prompt + completion or instruction + response"
    assert message == f"expected the columns {expected}, got instruction, answer"
    assert malformed({}).endswith("got none")
    assert malformed("text") == "expected a dict of columns, got str"


@pytest.mark.parametrize("answer", ["", " \n\t", None, 5, ["a"], torch.zeros(3, 3)])
@pytest.mark.parametrize("columns", [("instruction", "response"), ("prompt", "completion")])
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
