"""Files that are written whole: JSON that can be read again, whatever a row holds."""

from __future__ import annotations

import json

import pytest

from montessori.errors import DataError
from montessori.writing import read_json, write_json, write_jsonl


def test_rows_are_utf_8_and_half_a_surrogate_comes_back(tmp_path):
    rows = [{"text": "Grüße, 世界"}, {"text": "half \ud83d of one"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_bytes().decode("utf-8").splitlines()
    assert "世界" in lines[0]
    assert [json.loads(line) for line in lines] == rows


def test_what_json_does_not_have_is_an_error_unless_said_otherwise(tmp_path):
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"made": {1}}])
    assert not (tmp_path / "rows.jsonl").exists()
    write_jsonl(tmp_path / "rows.jsonl", [{"made": {1}}], default=str)
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"made": "{1}"}


@pytest.mark.parametrize("content", [None, "", "{", b"\xff"])
def test_what_cannot_be_read_names_the_file(content, tmp_path):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"record\.json: cannot be read .*; redo the stage"):
        read_json(path)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
