"""Files and folders of every kind give the same rows, and every error about a row names the file and the line."""

import gzip
import json

import pandas
import pyarrow
import pytest
from data_support import LINES, ROWS, fault, written

from montessori.data import load_rows

BOM = b"\xef\xbb\xbf"
ARRAY = json.dumps(ROWS, indent=1).encode()
CSV = "instruction,response\nSay hi,hi\nNaïve?,oui\n".encode()


# JSONL.


@pytest.mark.parametrize(
    "content",
    [LINES, LINES.rstrip(b"\n"), LINES.replace(b"\n", b"\r\n"), LINES + b"\n", LINES + b" \n\r\n\t", BOM + LINES],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json-lines", ".json", ".JSONL"])
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
    for content in (b"", b"\n\n", BOM):
        for name in ("data.jsonl", "data.json", "data.csv"):
            message = fault(written(tmp_path / name, content))
            assert message == f"{name}: expected at least one row, the source is empty"
    assert "expected at least one row" in fault(written(tmp_path / "data.json", b"[]"))
    assert "expected at least one row" in fault(written(tmp_path / "data.csv", b"instruction,response\n"))


# Other files.


def test_parquet_gives_plain_rows_counted_from_zero(tmp_path):
    path = tmp_path / "data.parquet"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pandas.DataFrame({"messages": [turns, turns], "id": [7, 8]}).to_parquet(path)
    rows = load_rows(path)
    assert list(rows) == [{"messages": turns, "id": 7}, {"messages": turns, "id": 8}]
    assert rows.where(12) == "data.parquet, row 12"


def test_parquet_errors_name_the_file(tmp_path):
    assert "expected a Parquet file" in fault(written(tmp_path / "data.parquet", b"no parquet"))
    pandas.DataFrame({"response": []}).to_parquet(tmp_path / "none.parquet")
    assert fault(tmp_path / "none.parquet").startswith("none.parquet: expected at least one row")


@pytest.mark.parametrize(
    "name", ["data.txt", "data", "data.gz", "data.parquet.gz", "data.parquet.zst", "data.jsonl.xz"]
)
def test_another_extension_is_an_error_that_says_what_is_supported(tmp_path, name):
    message = fault(written(tmp_path / name, LINES))
    assert all(kind in message for kind in (name, ".jsonl", ".json ", ".csv", ".gz", ".parquet", "save_to_disk"))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.csv.gz", "data.parquet"])
def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path / name, LINES)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("pyarrow.parquet.read_table", refuse)
    assert f"{path}: cannot be read ([Errno 13] Permission denied)" in fault(path)


@pytest.mark.parametrize("content", [ARRAY, BOM + ARRAY, b"\n " + ARRAY])
def test_a_json_array_gives_its_objects_counted_from_zero(tmp_path, content):
    rows = load_rows(written(tmp_path / "data.json", content))
    assert list(rows) == ROWS
    assert rows.where(1) == "data.json, row 1"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"a": 1}, 5]', "data.json, row 1: expected a JSON object, got int"),
        (b'[{"a": 1}', "data.json: expected a JSON array of objects, got malformed JSON ("),
        (b'[{"a": "\xe9"}]', "data.json: expected UTF-8, byte 8 of the file is 0xe9"),
        (b'{\n"a": 1\n}', "data.json, line 1: expected a JSON array of objects, or one JSON object per line"),
        (b'{"a": 1}\n\n{"a": 1}', "data.json, line 2: expected a JSON object, the line is empty"),
        (b"5", "data.json, line 1: expected a JSON object, got int"),
    ],
)
def test_json_errors_name_the_place(tmp_path, content, says):
    assert fault(written(tmp_path / "data.json", content)).startswith(says)


@pytest.mark.parametrize("content", [CSV, BOM + CSV, CSV.replace(b"\n", b"\r\n")])
def test_csv_gives_texts_counted_from_zero(tmp_path, content):
    rows = load_rows(written(tmp_path / "data.csv", content))
    assert list(rows) == ROWS
    assert rows.where(1) == "data.csv, row 1"


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\n\n"])
def test_rows_of_csv_are_counted_as_they_stand(tmp_path, end):
    rows = load_rows(written(tmp_path / "one.csv", b'\xef\xbb\xbftext\nhello\n\nworld\n""' + end))
    assert [row["text"] for row in rows] == ["hello", "", "world", ""]
    rows = load_rows(written(tmp_path / "two.csv", b"a,b\n1,2\n\n3,4" + end))
    assert list(rows) == [{"a": "1", "b": "2"}, {"a": "", "b": ""}, {"a": "3", "b": "4"}]


def test_cells_of_csv_stay_the_texts_they_are(tmp_path):
    content = b'id,input,response\n007,,"two\nlines, and a ""quote"""\n1e3,NA,null\n'
    assert list(load_rows(written(tmp_path / "data.csv", content))) == [
        {"id": "007", "input": "", "response": 'two\nlines, and a "quote"'},
        {"id": "1e3", "input": "NA", "response": "null"},
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b\n1,2,3\n", "data.csv, row 0: expected as many cells as the header has, 2, got more"),
        (b"a,b,a\n1,2,3\n", "data.csv: expected each column once, got 'a' 2 times"),
        (b"a,b\n1,2\n1,2,3\n", "data.csv: expected a CSV file with a header (Error tokenizing data"),
        (b'a,b\n1,"2\n', "data.csv: expected a CSV file with a header (Error tokenizing data"),
        (b"a,b\n1,caf\xe9\n", "data.csv: expected UTF-8 ("),
    ],
)
def test_csv_errors_name_the_file(tmp_path, content, says):
    assert fault(written(tmp_path / "data.csv", content)).startswith(says)


def zstandard(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".ZST", zstandard)])
@pytest.mark.parametrize(("name", "content"), [("data.jsonl", LINES), ("data.json", ARRAY), ("data.csv", CSV)])
def test_a_compressed_file_gives_the_rows_inside(tmp_path, name, content, ending, pack):
    packed = pack(content)
    # Tools that compress in parallel write one part after the other.
    halves = pack(content[:40]) + pack(content[40:])
    for whole in (packed, halves):
        rows = load_rows(written(tmp_path / f"{name}{ending}", whole))
        assert list(rows) == ROWS
    unit = "line 2" if name == "data.jsonl" else "row 1"
    assert rows.where(1) == f"{name}{ending}, {unit}"
    damaged = [content, packed[:-9]]
    if pack is gzip.compress:
        # Zstandard has a checksum only where it was asked for one.
        damaged.append(packed[:10] + b"\x07" + packed[11:])
    for raw in damaged:
        assert "cannot be read (" in fault(written(tmp_path / f"{name}{ending}", raw))


# Folders.


def folder(path, **files):
    path.mkdir()
    for name, rows in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_the_rows_of_its_files_by_name(tmp_path):
    source = folder(tmp_path / "parts", b=ROWS[1:] * 2, a=ROWS[:1], c=[], d=ROWS, e=[])
    written(source / "README.md", b"not data")
    written(source / "._b.jsonl", b"not data either")
    folder(source / "deeper", a=ROWS)
    rows = load_rows(source)
    assert list(rows) == [ROWS[0], ROWS[1], ROWS[1], *ROWS]
    files = ("a.jsonl, line 1", "b.jsonl, line 1", "b.jsonl, line 2", "d.jsonl, line 1", "d.jsonl, line 2")
    assert [rows.where(index) for index in range(len(rows))] == [f"parts/{file}" for file in files]


def test_a_folder_of_parquet_counts_the_rows_of_each_file(tmp_path):
    for index, row in enumerate(ROWS):
        pandas.DataFrame([row]).to_parquet(tmp_path / f"train-{index:05}-of-00002.parquet")
    rows = load_rows(tmp_path)
    assert list(rows) == ROWS
    assert rows.where(1) == f"{tmp_path.name}/train-00001-of-00002.parquet, row 0"


def test_a_part_of_the_rows_keeps_their_addresses(tmp_path):
    rows = load_rows(folder(tmp_path / "parts", a=ROWS, b=ROWS, c=ROWS))
    assert len(ROWS) == 2
    part = rows.part(1, 6).part(2, 4)
    assert list(part) == list(rows)[3:5]
    assert [part.where(index) for index in range(2)] == ["parts/b.jsonl, line 2", "parts/c.jsonl, line 1"]
    assert list(rows.part(5)) == ROWS[1:] and list(rows.part(0, None)) == list(rows)
    of_file = load_rows(written(tmp_path / "data.jsonl", LINES)).part(1)
    assert list(of_file) == ROWS[1:] and of_file.where(0) == "data.jsonl, line 2"


def test_a_folder_may_mix_the_forms_of_json_but_not_the_kinds(tmp_path):
    source = folder(tmp_path / "parts", b=ROWS)
    written(source / "a.json", ARRAY)
    written(source / "c.jsonl.gz", gzip.compress(LINES))
    written(source / "c2.ndjson", LINES)
    rows = load_rows(source)
    assert list(rows) == ROWS * 4
    assert rows.where(1) == "parts/a.json, row 1"
    written(source / "d.csv", CSV)
    message = fault(source)
    assert message.startswith(f"{source}: expected data files of one kind, got ")
    assert "d.csv" in message


def test_errors_about_a_folder_name_the_file_in_it(tmp_path):
    source = folder(tmp_path / "parts", a=ROWS, b=[ROWS[0], 5])
    assert fault(source) == "parts/b.jsonl, line 2: expected a JSON object, got int"
    assert fault(folder(tmp_path / "none", a=[], b=[])) == "none: expected at least one row, the source is empty"
    empty = folder(tmp_path / "empty")
    written(empty / "data.txt", LINES)
    message = fault(empty)
    assert message.startswith(f"{empty}: expected .jsonl") and "save_to_disk" in message
