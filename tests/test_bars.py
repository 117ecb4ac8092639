"""Bars that say how far reading and scoring are, where somebody looks on or it takes long."""

import io
import sys

import pytest
from encoding_support import CHATML, MARKED, ROW, byte_level, encode
from support import options

from montessori import bars, encoding

ROWS = [*[ROW] * 5, *[{"input_ids": [5, 6], "labels": [-100, 6]}] * 3, {}, {"text": "a"}]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(eos_token="<|im_end|>")


@pytest.fixture
def shown(tokenizer, monkeypatch):
    """What is shown on a stream while rows are read."""

    def read(stream, template=CHATML, progress=True):
        monkeypatch.setattr(sys, "stderr", stream)
        encoded = encode(ROWS, tokenizer, invalid_rows="skip", chat_template=template, progress=progress)
        assert len(encoded.examples) == 9
        return stream.getvalue()

    return read


@pytest.mark.parametrize("template", [CHATML, MARKED, "none"])
def test_a_bar_counts_every_row_that_is_read(template, shown, monkeypatch):
    monkeypatch.setattr(encoding, "SECONDS_UNSHOWN", 0)
    monkeypatch.setattr(encoding, "ROWS_PER_CALL", 2)
    last = shown(Terminal(), template).split("\r")[-1]
    assert last.startswith("reading: 100%") and " 10.0/10.0 " in last
    assert shown(Terminal(), template, progress=False) == ""


def test_what_is_soon_read_shows_no_bar(shown, monkeypatch):
    monkeypatch.setattr(encoding, "SECONDS_UNSHOWN", 1000)
    assert shown(Terminal()) == shown(io.StringIO()) == ""
    monkeypatch.setattr(bars, "SECONDS_IN_A_LOG", 0)
    assert "reading: 100%" in shown(io.StringIO())


def test_a_command_shows_that_it_reads_before_it_scores(run, student, files, tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "SECONDS_IN_A_LOG", 0)
    words = [*options(student, files), "--audit", "2", "--out", tmp_path / "scores.parquet"]
    status, _, error = run("score", *words)
    assert status == 0 and 0 < error.index("reading: 100%") < error.index("scoring: 100%")
    status, _, error = run("score", *words, "--fresh", "--quiet")
    assert status == 0 and "reading" not in error and "scoring" not in error
