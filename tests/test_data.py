"""Every kind of source gives the same rows, and every error about a row names the file and the line."""

import json
from pathlib import Path

import datasets
import numpy
import pandas
import pyarrow
import pytest
from data_support import LINES, ROWS, fault, written

from montessori.data import Rows, is_row, load_rows
from montessori.errors import ArgumentError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TURNS = [USER, ASSISTANT]


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


@pytest.mark.parametrize(
    ("source", "one"),
    [
        ({"prompt": "a", "completion": "b"}, True),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, True),
        ({"conversations": [{"from": "human", "value": "a"}]}, True),
        ({"input_ids": [1, 2], "labels": [1, 2]}, True),
        ({"messages": [{"prompt": "a", "completion": "b"}]}, False),
        ({"question": "a.jsonl", "answer": "b.jsonl"}, False),
        ({"prompt": [{"messages": []}], "completion": [{"instruction": "a", "response": "b"}]}, False),
        ({"train": [{"prompt": "a", "completion": "b"}]}, False),
    ],
)
def test_sets_may_be_called_as_columns_are(source, one):
    assert is_row(source) is one
