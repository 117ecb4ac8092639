"""The commands as a user types them, on a tiny student."""

from __future__ import annotations

import json
import sys

import pytest
from support import CHATML, make_text_rows

from montessori import Scores, cli


@pytest.fixture
def files(tmp_path):
    paths = {"candidates": tmp_path / "candidates.jsonl", "reference": tmp_path / "reference.jsonl"}
    for seed, path in enumerate(paths.values()):
        path.write_text("".join(json.dumps(row) + "\n" for row in make_text_rows(12, seed=seed)))
    return paths


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; returns its exit status, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["montessori", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def options(student, files, /, **changes):
    chosen = {"student": student, "optimizer": student, **files, **changes}
    return [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", value)]


def test_score_inspect_and_replay(run, student, files, tmp_path):
    out = tmp_path / "new" / "scores.parquet"
    status, shown, _ = run("score", *options(student, files), "--out", out, "--audit", "4", "--quiet")
    assert status == 0
    assert "12 candidates, 12 scored by anchored" in shown
    assert "predicted against real steps" in shown
    record = json.loads((tmp_path / "new" / "scores.parquet.audit.json").read_text())
    assert len(record["index"]) == 4

    png = tmp_path / "plots" / "histogram.png"
    status, shown, _ = run("inspect", out, "--candidates", files["candidates"], "--top", 2, "--png", png)
    assert status == 0
    assert "highest 2" in shown and "lowest 2" in shown
    best = int(Scores.load(out).influence.argmax())
    assert make_text_rows(12, seed=0)[best]["instruction"][:8] in shown
    assert png.read_bytes().startswith(b"\x89PNG")

    replay = tmp_path / "replay.parquet"
    status, _, _ = run("score", "--config", f"{out}.config.json", "--out", replay, "--quiet")
    assert status == 0
    assert replay.read_bytes() == out.read_bytes()


def test_what_the_template_is_told_is_kept_and_replayed(run, student, files, tmp_path):
    told = "{% if loud is defined %}say {% endif %}" + CHATML
    template = tmp_path / "told.jinja"
    template.write_text(told)
    common = [*options(student, files, chat_template=template), "--quiet", "--out"]
    plain, loud, again = (tmp_path / f"{name}.parquet" for name in ("plain", "loud", "again"))
    assert run("score", *common, plain)[0] == 0
    assert run("score", *common, loud, "--chat-template-kwargs", '{"loud": true}')[0] == 0
    assert run("score", "--config", f"{loud}.config.json", "--out", again, "--quiet")[0] == 0
    tokens = [Scores.load(path).num_tokens.sum() for path in (plain, loud, again)]
    assert tokens[0] < tokens[1] == tokens[2]
    status, _, error = run("score", *common, plain, "--chat-template-kwargs", "{loud}")
    assert status == 2 and "expected a JSON object" in error


def test_several_reference_sets_by_name(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    words = options(student, files, reference=f"first={files['reference']}")
    status, _, _ = run("score", *words, "--reference", f"second={files['candidates']}", "--out", out, "--quiet")
    assert status == 0
    assert Scores.load(out).names == ("first", "second")
    status, shown, _ = run("inspect", out, "--set", "second", "--quantity", "centred")
    assert status == 0 and "centred on second" in shown


def test_audit_prints_the_agreement(run, student, files, tmp_path):
    status, shown, _ = run("audit", *options(student, files), "-k", 3, "--out", tmp_path / "audit.json", "--quiet")
    assert status == 0
    assert "Spearman" in shown and "centred" in shown
    assert json.loads((tmp_path / "audit.json").read_text())["agreement"]["reference"]["num_examples"] == 3


def test_warmup_leaves_a_checkpoint_that_can_be_scored(run, student, files, tmp_path):
    words = ["--student", student, "--data", files["candidates"], "--out", tmp_path / "warm", "--max-steps", 2]
    status, shown, _ = run("warmup", *words, "--batch-size", 4, "--learning-rate", 1e-4)
    assert status == 0
    checkpoint = tmp_path / "warm" / "checkpoint-2"
    assert str(checkpoint) in shown.replace("\n", "")
    status, _, _ = run("score", *options(checkpoint, files), "--out", tmp_path / "s.parquet", "--quiet")
    assert status == 0


def write(path, text):
    path.write_text(text)
    return path


BAD = {
    "malformed line": (lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"instruction": 1\n')}, ["c.jsonl, line 1"]),
    "empty line": (
        lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"prompt": "a", "completion": "b"}\n\n{}\n')},
        ["c.jsonl, line 2"],
    ),
    "missing column": (lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"text": "a"}\n')}, ["line 1", "text"]),
    "empty response": (
        lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"prompt": "a", "completion": " "}\n')},
        ["line 1", "completion"],
    ),
    "too long": (lambda tmp: {"max_length": 5}, ["5 tokens", "--max-length"]),
    "no such file": (lambda tmp: {"candidates": tmp / "none.jsonl"}, ["none.jsonl"]),
    "no such student": (lambda tmp: {"student": tmp / "nobody"}, ["nobody"]),
    "no optimizer state": (lambda tmp: {"optimizer": tmp}, ["optimizer.pt"]),
    "budget too small": (lambda tmp: {"batch_tokens": 3}, ["batch_tokens=3"]),
    "learning rate 0": (lambda tmp: {"lr": 0}, ["learning rate is 0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(run, student, files, tmp_path, case):
    change, words = BAD[case]
    out = tmp_path / "scores.parquet"
    status, _, error = run("score", *options(student, files, **change(tmp_path)), "--out", out, "--quiet")
    assert status == 2
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0])
    assert all(word in lines[0] for word in words), lines[0]
    assert not out.exists()


def test_output_that_cannot_be_written(run, student, files, tmp_path):
    write(tmp_path / "file", "")
    status, _, error = run("score", *options(student, files), "--out", tmp_path / "file" / "s.parquet", "--quiet")
    assert status == 2 and "cannot be written" in error


def test_finished_scores_are_not_overwritten_by_other_settings(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    assert run("score", *options(student, files), "--out", out, "--quiet")[0] == 0
    before = out.read_bytes()
    status, _, error = run("score", *options(student, files, method="first_order"), "--out", out, "--quiet")
    assert status == 2 and "--fresh" in error
    assert out.read_bytes() == before
    status, *_ = run("score", *options(student, files, method="first_order"), "--out", out, "--quiet", "--fresh")
    assert status == 0 and Scores.load(out).method == "first_order"


def test_finished_scores_are_not_given_for_data_that_changed(run, student, files, tmp_path):
    words = [*options(student, files), "--out", tmp_path / "scores.parquet", "--quiet"]
    assert run("score", *words)[0] == 0
    assert run("score", *words)[0] == 0
    write(files["candidates"], "".join(json.dumps(row) + "\n" for row in make_text_rows(12, seed=7)))
    status, _, error = run("score", *words)
    assert status == 2 and "candidates changed since" in error and "--fresh" in error


def test_an_audit_belongs_to_the_scores_beside_it(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    words = [*options(student, files), "--out", out, "--quiet"]
    assert run("score", *words, "--audit", 4)[0] == 0
    assert run("score", *words, "--fresh", "--lr", 1e-9)[0] == 0
    status, _, error = run("score", *words, "--lr", 1e-9, "--audit", 4)
    assert status == 2 and "no audit was saved with these scores" in error


def test_a_fresh_start_that_fails_leaves_what_was_there(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    assert run("score", *options(student, files), "--out", out, "--quiet")[0] == 0
    before = out.read_bytes()
    words = options(student, files, candidates=tmp_path / "typo.jsonl")
    assert run("score", *words, "--out", out, "--quiet", "--fresh")[0] == 2
    assert out.read_bytes() == before


def test_one_set_keeps_the_name_it_was_given(run, student, files, tmp_path):
    (tmp_path / "run=3").mkdir()
    path = tmp_path / "run=3" / "reference.jsonl"
    path.write_bytes(files["reference"].read_bytes())
    for reference, name in ((f"[en]={path}", "[en]"), (path, "reference")):
        out = tmp_path / f"{name}.parquet"
        assert run("score", *options(student, files, reference=reference), "--out", out, "--quiet")[0] == 0
        assert Scores.load(out).names == (name,)
        status, shown, _ = run("inspect", out, "--set", name)
        assert status == 0 and f"influence on {name}" in shown


def test_rows_of_several_kinds_are_shown(run, student, files, tmp_path):
    messages = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "hello b"}]
    rows = [
        {"instruction": "say c", "response": "hello d", "messages": None},
        {"instruction": None, "response": None, "messages": messages},
    ]
    write(files["candidates"], "".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.parquet"
    assert run("score", *options(student, files), "--out", out, "--quiet")[0] == 0
    status, shown, _ = run("inspect", out, "--candidates", files["candidates"])
    assert status == 0 and "say a → hello" in shown and "say c → hello" in shown


def test_inspect_refuses_what_is_not_a_scores_file(run, files):
    status, _, error = run("inspect", files["candidates"])
    assert status == 2 and "not a readable Parquet file" in error


def test_interrupt_says_that_the_run_can_go_on(run, student, files, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("montessori.runs.open_workbench", interrupted)
    status, _, error = run("score", *options(student, files), "--out", tmp_path / "s.parquet", "--quiet")
    assert status == 130 and "same command" in error
