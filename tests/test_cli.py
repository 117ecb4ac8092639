"""The commands as a user types them, on a tiny student."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import CHATML, make_text_rows, options
from test_loop_pairs import make_scores

from montessori import Scores, ops, runs
from montessori.errors import ArgumentError
from montessori.estimator import InfluenceEstimator
from montessori.scorers import LinearScorer


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
    # Which has a setting more than an audit.
    assert run("audit", "--config", f"{out}.config.json", "-k", 2, "--quiet")[0] == 0


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
    status, shown, bars = run("warmup", *words, "--batch-size", 4, "--learning-rate", 1e-4, "--quiet")
    assert status == 0 and "%|" not in shown + bars
    checkpoint = tmp_path / "warm" / "checkpoint-2"
    assert str(checkpoint) in shown.replace("\n", "") and "--max-grad-norm" not in shown
    words[5] = tmp_path / "clipped"
    status, shown, _ = run("warmup", *words, "--batch-size", 4, "--max-grad-norm", 0.5, "--quiet")
    assert status == 0 and f"--optimizer {tmp_path / 'clipped/checkpoint-2'} --max-grad-norm 0.5 …" in shown
    status, _, _ = run("score", *options(checkpoint, files), "--out", tmp_path / "s.parquet", "--quiet")
    assert status == 0


def write(path, text):
    path.write_text(text)
    return path


def folder(path):
    path.mkdir()
    return path


BAD = {
    "malformed line": (lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"instruction": 1\n')}, ["c.jsonl, line 1"]),
    "empty line": (
        lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"prompt": "a", "completion": "b"}\n\n{}\n')},
        ["c.jsonl, line 2"],
    ),
    "missing column": (lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"body": "a"}\n')}, ["line 1", "body"]),
    "empty response": (
        lambda tmp: {"candidates": write(tmp / "c.jsonl", '{"prompt": "a", "completion": " "}\n')},
        ["line 1", "completion"],
    ),
    "too long": (lambda tmp: {"max_length": 5}, ["5 tokens", "--max-length"]),
    "no such file": (lambda tmp: {"candidates": tmp / "none.jsonl"}, ["none.jsonl"]),
    "no such student": (lambda tmp: {"student": tmp / "nobody"}, ["nobody"]),
    "no name": (lambda tmp: {"reference": f"={tmp / 'reference.jsonl'}"}, ["--reference =", "name=path"]),
    "no optimizer state": (lambda tmp: {"optimizer": write(folder(tmp / "other") / "x", "").parent}, ["optimizer.pt"]),
    "budget too small": (lambda tmp: {"batch_tokens": 3}, ["batch_tokens=3"]),
    "learning rate 0": (lambda tmp: {"lr": 0}, ["lr=0.0: expected a positive number", "leave it out"]),
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


@pytest.mark.parametrize("command", ["score", "audit"])
@pytest.mark.parametrize("option", ["student", "optimizer", "candidates", "reference"])
def test_an_output_within_an_input_is_refused(run, student, files, tmp_path, command, option):
    (inner := folder(tmp_path / "read")).joinpath("rows.jsonl").write_bytes(files["reference"].read_bytes())
    changed = {option: f"name={inner}" if option == "reference" else inner}
    out = inner / "new" / ("s.parquet" if command == "score" else "a.json")
    status, _, error = run(command, *options(student, files, **changed), "--out", out, "--quiet")
    assert status == 2 and error.startswith("error: --out ") and f"--{option}" in error.splitlines()[-1]
    assert not out.parent.exists()


def test_output_that_cannot_be_written(run, student, files, tmp_path):
    write(tmp_path / "file", "")
    status, _, error = run("score", *options(student, files), "--out", tmp_path / "file" / "s.parquet", "--quiet")
    assert status == 2 and "cannot be written" in error


@pytest.mark.parametrize(
    ("command", "name", "suffix"), [("score", "s.csv", ".parquet"), ("audit", "a.parquet", ".json")]
)
def test_a_name_that_belies_the_format_is_refused(run, student, files, tmp_path, command, name, suffix):
    status, _, error = run(command, *options(student, files), "--out", tmp_path / name, "--quiet")
    assert (
        status == 2 and error.startswith("error: --out ") and f"{name}: expected a name that ends in {suffix}" in error
    )
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("place", ["/proc/a.json", "file/a.json"])
def test_an_audit_that_cannot_be_written_takes_no_step(run, student, files, tmp_path, monkeypatch, place):
    monkeypatch.setattr("montessori.runs.open_workbench", None)
    write(tmp_path / "file", "")
    status, _, error = run("audit", *options(student, files), "--out", tmp_path / place, "--quiet")
    assert status == 2 and error.startswith("error: ") and "a.json: cannot be written" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "/proc/w"], "error: /proc/w: cannot be written"),
        (["--out", "FILE"], "Directory 'FILE' is a file"),
        (["--out", "w", "--max-steps", 0], "error: max_steps=0: expected at least 1"),
        (["--out", "w", "--max-steps", -2], "error: max_steps=-2: expected at least 1"),
        (["--out", "w", "--seed", -1], "--seed"),
        (["--out", "w", "--weight-decay", -1], "--weight-decay"),
        (["--out", "w", "--weight-decay", "nan"], "error: weight_decay=nan: expected 0 or a positive number"),
        (["--out", "w", "--epochs", 0], "--epochs"),
    ],
)
def test_a_warmup_that_cannot_run_says_so_in_one_line(run, student, files, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "FILE", "")
    status, _, error = run("warmup", "--student", student, "--data", files["candidates"], *words)
    assert status == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "w").exists()


def test_a_run_leaves_no_journal_of_one_on_more_processes(run, student, files, tmp_path):
    journals = [write(tmp_path / f"scores.parquet.journal.{rank}.jsonl", "") for rank in (1, 3)]
    other = write(tmp_path / "scores.parquet.journal.mine.jsonl", "")
    assert run("score", *options(student, files), "--out", tmp_path / "scores.parquet", "--quiet")[0] == 0
    assert other.exists() and not any(journal.exists() for journal in journals)


def test_an_audit_belongs_to_the_scores_beside_it(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    words = [*options(student, files), "--out", out, "--quiet"]
    assert run("score", *words, "--audit", 4)[0] == 0
    first = (tmp_path / "scores.parquet.audit.json").read_bytes()
    assert run("score", *words, "--fresh", "--lr", 1e-9)[0] == 0
    assert not (tmp_path / "scores.parquet.audit.json").exists()
    assert run("score", *words, "--lr", 1e-9, "--audit", 4)[0] == 0
    assert (tmp_path / "scores.parquet.audit.json").read_bytes() != first


def count_scored(monkeypatch):
    """The number of candidates in each batch that is scored from now on."""
    scored, score = [], LinearScorer.score

    def counted(self, group):
        scored.append(len(group))
        return score(self, group)

    monkeypatch.setattr(LinearScorer, "score", counted)
    return scored


@pytest.mark.parametrize("ended", [KeyboardInterrupt, ArgumentError])
def test_an_audit_that_ends_early_keeps_the_scores_and_is_done_by_the_same_command(
    run, student, files, tmp_path, monkeypatch, ended
):
    def stopped(*_args, **_kwargs):
        raise ended("stopped")

    out = tmp_path / "scores.parquet"
    words = [*options(student, files), "--out", out, "--quiet", "--audit", 4]
    with monkeypatch.context() as patch:
        patch.setattr(InfluenceEstimator, "audit", stopped)
        status, _, error = run("score", *words)
    assert status != 0
    if ended is ArgumentError:
        assert error.rstrip().endswith(f"error: stopped; the scores are in {out}")
    scores = Scores.load(out)
    scored = count_scored(monkeypatch)
    status, shown, _ = run("score", *words)
    assert status == 0 and "predicted against real steps" in shown
    # Those of the audit alone.
    assert sum(scored) == 4
    assert Scores.load(out) == scores
    scored.clear()
    status, shown, error = run("score", *words)
    assert status == 0 and "is complete" in error and "predicted against real steps" in shown and not scored
    # Another number is another audit of the same scores.
    assert run("score", *words[:-1], 6)[0] == 0
    assert sum(scored) == 6
    assert len(json.loads((tmp_path / "scores.parquet.audit.json").read_text())["index"]) == 6


@pytest.mark.parametrize("size", [1, 16])
def test_an_audit_of_one_candidate_is_refused_before_anything_is_scored(
    run, student, files, tmp_path, monkeypatch, size
):
    scored = count_scored(monkeypatch)
    if size > 1:
        write(files["candidates"], json.dumps(make_text_rows(1)[0]) + "\n")
    out = tmp_path / "scores.parquet"
    status, _, error = run("score", *options(student, files), "--out", out, "--quiet", "--audit", size)
    assert status == 2 and f"error: audit of {size}: expected at least 2 candidates" in error
    assert not scored and not out.exists()


def test_scores_of_an_earlier_version_are_complete_and_replayed_without_the_settings_it_lacked(
    run, student, files, tmp_path
):
    out = tmp_path / "scores.parquet"
    words = [*options(student, files), "--out", out, "--quiet"]
    assert run("score", *words)[0] == 0
    config = tmp_path / "scores.parquet.config.json"
    record = json.loads(config.read_text())
    for name in ("reference_batch_tokens", "invalid_rows"):
        del record["settings"][name]
    write(config, json.dumps(record))
    status, _, error = run("score", *words)
    assert status == 0 and "is complete" in error
    status, *_ = run("score", "--config", config, "--out", tmp_path / "again.parquet", "--quiet")
    assert status == 0 and Scores.load(tmp_path / "again.parquet") == Scores.load(out)
    status, _, error = run("score", *words, "--reference-batch-tokens", 64)
    assert status == 2 and "was not written with these settings" in error
    for content in ("[]", '{"settings": 3}', "{"):
        status, _, error = run("score", "--config", write(tmp_path / "bad.json", content), "--out", out)
        assert status == 2 and "bad.json: expected a config written by montessori score" in error


def test_settings_reach_the_estimator(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    rows = [*make_text_rows(3), {"instruction": "say a", "response": " "}]
    write(files["candidates"], "".join(json.dumps(row) + "\n" for row in rows))
    words = [*options(student, files, dtype="float16", reference_batch_tokens=64), "--out", out, "--quiet"]
    status, _, error = run("score", *words)
    assert status == 2 and "line 4" in error
    status, shown, _ = run("score", *words, "--invalid-rows", "skip")
    assert status == 0
    scores = Scores.load(out)
    assert scores.ok.tolist() == [True, True, True, False]
    assert "not scored (invalid): 1, rows 3" in shown and "line 4" in shown


def test_help_lists_the_backends_and_each_is_taken_or_refused_with_a_reason(run, student, files, tmp_path):
    assert set(ops.available_impls()) < set(runs.BACKENDS)
    _, shown, _ = run("score", "--help")
    assert f"[{'|'.join(runs.BACKENDS)}]" in shown
    for backend in set(runs.BACKENDS) - {"auto", *ops.available_impls()}:
        status, _, error = run("score", *options(student, files, backend=backend), "--out", tmp_path / "s.parquet")
        assert status == 2 and f"error: --backend='{backend}': " in error
        assert "in this installation: " in error


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
        {"messages": [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "olleh b"}]}]},
        {"prompt": messages[:1], "completion": messages[1:]},
        {"conversations": [{"from": "human", "value": "say e"}, {"from": "gpt", "value": "hello f"}]},
        {"instruction": "say g", "output": "hello h"},
        {"text": "plain text"},
        {"text": "\x1b[31m red \u202e back \x00"},
    ]
    write(files["candidates"], "".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.parquet"
    assert run("score", *options(student, files), "--out", out, "--quiet")[0] == 0
    status, shown, _ = run("inspect", out, "--candidates", files["candidates"])
    assert status == 0
    assert not set("\x1b\u202e\x00") & set(shown) and "red" in shown
    for text in ("say a → hello", "say c → hello", "say a → olleh", "say e → hello", "say g → hello", "plain text"):
        assert text in shown


def test_inspect_refuses_what_is_not_a_scores_file(run, files):
    status, _, error = run("inspect", files["candidates"])
    assert status == 2 and "not a readable Parquet file" in error
    status, _, error = run("inspect", "nope.parquet")
    assert status == 2 and error == "error: nope.parquet: no such file\n"
    status, _, error = run("inspect", files["candidates"].parent)
    assert status == 2 and "expected a file, got a directory" in error


def test_inspect_refuses_other_rows_than_those_that_were_scored(run, student, files, tmp_path):
    out, turned = tmp_path / "scores.parquet", tmp_path / "turned.jsonl"
    assert run("score", *options(student, files), "--out", out, "--quiet")[0] == 0
    turned.write_text("".join(f"{line}\n" for line in files["candidates"].read_text().splitlines()[::-1]))
    status, shown, error = run("inspect", out, "--candidates", turned)
    assert status == 2 and "turned.jsonl: expected the rows that were scored" in error and not shown
    config = out.with_name("scores.parquet.config.json")
    whole = config.read_text()
    config.write_text(whole[:20])
    status, _, error = run("inspect", out, "--candidates", files["candidates"])
    assert status == 2 and "expected a config written by montessori score" in error
    config.write_text(whole)
    # Rows lie where they like.
    moved = turned.with_name("moved.jsonl")
    moved.write_text(files["candidates"].read_text())
    assert run("inspect", out, "--candidates", moved)[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    make_scores(np.array([0.1, -0.3, 0.2]), np.ones(3)).save(tmp_path / "scores.parquet")
    command = [sys.executable, "-m", "montessori", "inspect", str(tmp_path / "scores.parquet")]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: the output cannot be written (No space left on device)\n"


def test_rows_that_a_warmup_leaves_out_are_counted(run, student, files, tmp_path):
    words = ["--student", student, "--data", files["candidates"], "--out", tmp_path / "warm", "--max-steps", 1]
    status, _, error = run("warmup", *words, "--batch-size", 4, "--max-length", 16, "--truncation", "skip", "--quiet")
    assert status == 0, error
    assert re.search(r"left out \(too_long\): \d+ of 12 rows", error)
    status, _, error = run("warmup", *words, "--max-steps", 10**20)
    assert status == 2 and "--max-steps" in error


def test_values_that_are_not_finite_are_counted_apart_and_in_no_picture(run, tmp_path):
    scores = make_scores(np.array([0.1, np.inf, -0.3, 0.2]), np.ones(4))
    some, none, png = tmp_path / "some.parquet", tmp_path / "none.parquet", tmp_path / "histogram.png"
    scores.save(some)
    replace(scores, drift=float("nan")).save(none)
    status, shown, _ = run("inspect", some, "--png", png)
    assert status == 0 and "not finite: 1\n" in shown and "█" in shown and png.is_file()
    png.unlink()
    assert run("inspect", none, "--png", png)[0] == 0
    status, shown, error = run("inspect", none, "--quantity", "centred", "--png", tmp_path / "centred.png")
    assert "not finite: 4\n" in shown and "█" not in shown
    assert status == 2 and "expected a finite centred on reference of some candidate, got none" in error
    assert error.count("\n") == 1 and not (tmp_path / "centred.png").exists()


def test_interrupt_says_that_the_run_can_go_on(run, student, files, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("montessori.runs.open_workbench", interrupted)
    status, _, error = run("score", *options(student, files), "--out", tmp_path / "s.parquet", "--quiet")
    assert status == 130 and "interrupted; the same command goes on from here" in error
    status, _, error = run("score", *options(student, files), "--out", tmp_path / "s.parquet", "--quiet", "--fresh")
    assert status == 130 and "the same command, without --fresh, goes on" in error
    monkeypatch.setattr("montessori.loop.report.run", interrupted)
    status, _, error = run("report", tmp_path)
    assert status == 130 and error.strip() == "interrupted"
