"""Where commands read and write: `~`, outputs that are inputs, names that no file has, terminals of few letters."""

from __future__ import annotations

import io
import shutil
import sys

import pytest

from montessori import cli
from montessori.scores import Scores
from montessori.writing import read_json


@pytest.fixture
def given(student, files):
    """The options of a scoring, as words."""
    options = {"student": student, "optimizer": student, **files}
    return [word for name, path in options.items() for word in (f"--{name}", path)]


def test_a_tilde_is_the_home_wherever_it_stands(run, given, student, files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run("score", *given, "--quiet", "--out", "~/d/out.parquet")[0] == 0
    assert len(Scores.load("~/d/out.parquet")) == 12
    assert run("inspect", "~/d/out.parquet", "--candidates", files["candidates"], "--png", "~/d/seen.png")[0] == 0
    again = ["score", "--config", "~/d/out.parquet.config.json", "--quiet", "--out", "~/d/again.parquet"]
    assert run(*again)[0] == 0
    data = ["--student", student, "--data", files["candidates"], "--max-steps", "1", "--batch-size", "4", "--quiet"]
    assert run("warmup", *data, "--out", "~/d/warm")[0] == 0
    made = {path.name for path in (tmp_path / "home/d").iterdir()}
    assert {"out.parquet", "again.parquet", "seen.png", "warm"} <= made
    assert not (tmp_path / "~").exists()


def test_what_is_read_is_not_written_over(run, given, student, files, tmp_path):
    before = files["reference"].read_bytes()
    for command, name in (("audit", "rows.json"), ("score", "rows.parquet")):
        own = tmp_path / name
        own.write_bytes(before)
        status, _, told = run(command, *given, "--candidates", own, "--quiet", "--out", own)
        assert (status, own.read_bytes()) == (2, before)
        assert "expected a path outside of" in told and "which --candidates reads" in told
    # Nor what is no audit, but an audit is.
    other = tmp_path / "other.json"
    other.write_text('{"settings": 1}')
    status, _, told = run("audit", *given, "-k", 2, "--quiet", "--out", other)
    assert status == 2 and told == f"error: --out {other}: exists and is no audit; choose another --out\n"
    for _ in range(2):
        assert run("audit", *given, "-k", 2, "--quiet", "--out", tmp_path / "audit.json")[0] == 0
    assert "agreement" in read_json(tmp_path / "audit.json")
    copy = shutil.copytree(student, tmp_path / "copy")
    for out in (copy, copy / "inside"):
        words = ["--student", copy, "--data", files["candidates"], "--quiet", "--out", out]
        status, _, told = run("warmup", *words)
        assert status == 2 and "which --student reads" in told
    assert {path.name for path in copy.iterdir()} == {path.name for path in student.iterdir()}


@pytest.mark.parametrize("option", ["--student", "--optimizer", "--candidates", "--reference", "--out"])
@pytest.mark.parametrize("path", ["x" * 300 + ".parquet", "loop/x.parquet", "~nobody-here/x.parquet"])
def test_a_path_that_no_file_can_have_is_one_line(option, path, run, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    status, _, told = run("score", *given, "--quiet", "--out", tmp_path / "out.parquet", option, path)
    assert status == 2 and told.count("\n") == 1 and told.startswith("error: ")


def test_a_reference_without_a_path_is_told_as_such(run, given, tmp_path):
    status, _, told = run("score", *given, "--reference", "a=", "--out", tmp_path / "out.parquet")
    assert status == 2 and told == "error: --reference a=: expected name=path, the path is empty\n"


def test_a_terminal_without_all_letters_gets_others(run, given, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"
    assert run("score", *given, "--quiet", "--out", out)[0] == 0
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["montessori", "inspect", str(out)])
    cli.main()
    sys.stdout.flush()
    assert b"?" in written.getvalue()
