"""Scores of what has changed since are not given, and what is wrong in itself is said before slow work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from support import CHATML, make_text_rows, options
from transformers.utils import logging

from montessori import Scores, cli, reading, runs
from montessori.data import load_rows
from montessori.encoding import encode_rows
from montessori.fingerprint import content_digest
from montessori.loop import commands


def write(path, text):
    path.write_text(text)
    return path


def test_finished_scores_are_not_overwritten_by_other_settings(run, student, files, tmp_path):
    out = tmp_path / "scores.parquet"
    assert run("score", *options(student, files), "--out", out, "--quiet")[0] == 0
    before = out.read_bytes()
    status, _, error = run("score", *options(student, files, method="first_order"), "--out", out, "--quiet")
    assert status == 2 and "--fresh" in error
    assert out.read_bytes() == before
    status, *_ = run("score", *options(student, files, method="first_order"), "--out", out, "--quiet", "--fresh")
    assert status == 0 and Scores.load(out).method == "first_order"


def test_candidates_are_loaded_and_tokenised_once(run, student, files, tmp_path, monkeypatch):
    loaded, tokenised = [], []

    def loading(path, **options):
        loaded.append(Path(path).name)
        return load_rows(path, **options)

    def tokenising(rows, *args, **options):
        tokenised.append(rows.source)
        return encode_rows(rows, *args, **options)

    monkeypatch.setattr(runs, "load_rows", loading)
    monkeypatch.setattr(reading, "encode_rows", tokenising)
    words = [*options(student, files), "--audit", "4", "--out", tmp_path / "scores.parquet", "--quiet"]
    assert run("score", *words)[0] == 0
    assert sorted(loaded) == sorted(tokenised) == ["candidates.jsonl", "reference.jsonl"]


def test_finished_scores_are_not_given_for_data_that_changed(run, student, files, tmp_path):
    words = [*options(student, files), "--out", tmp_path / "scores.parquet", "--quiet"]
    assert run("score", *words)[0] == 0
    assert run("score", *words)[0] == 0
    write(files["candidates"], "".join(json.dumps(row) + "\n" for row in make_text_rows(12, seed=7)))
    status, _, error = run("score", *words)
    assert status == 2 and "candidates changed since" in error and "--fresh" in error


def test_finished_scores_are_not_given_for_a_template_or_a_student_that_changed(
    run, student, files, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(student, tmp_path / "own")
    template = write(tmp_path / "own.jinja", CHATML)
    words = [*options("~/own", files, chat_template=template), "--out", tmp_path / "scores.parquet", "--quiet"]
    assert run("score", *words)[0] == 0
    assert run("score", *words)[0] == 0
    write(template, CHATML + " ")
    status, _, error = run("score", *words)
    assert status == 2 and "chat template changed since" in error
    write(template, CHATML)
    file = next((tmp_path / "own").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    status, _, error = run("score", *words)
    assert status == 2 and "optimizer, student changed since" in error


def test_an_adapter_is_another_one_once_its_local_base_has_changed(tmp_path):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    write(tmp_path / "base" / "w.bin", "1")
    config = tmp_path / "adapter" / "adapter_config.json"
    write(config, json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    before = content_digest(tmp_path / "adapter")
    write(tmp_path / "base" / "w.bin", "2")
    assert content_digest(tmp_path / "adapter") != before
    for other in ("someone/base-on-the-hub", None, str(tmp_path), str(tmp_path / "adapter")):
        write(config, json.dumps({"base_model_name_or_path": other}))
        assert content_digest(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference-dtype", "model"], "reference_dtype='model'"),
        (["--sample", "0.5", "--method", "exact"], "method='exact' takes real steps"),
        (["--sample", "0.5", "--backend", "reference"], "nothing else can sample"),
        (["--max-grad-norm", "nan"], "max_grad_norm=nan"),
        (["--lr", "-1"], "lr=-1.0: expected a positive number"),
        (["--lr", "0"], "lr=0.0: expected a positive number"),
        (["--optimizer", "nowhere"], "nowhere: no such directory"),
        (["--optimizer", ""], "--optimizer: expected a path or a name, got an empty one"),
        (["--student", ""], "--student: expected a path or a name, got an empty one"),
        (["--student", "./nowhere"], "expected a checkpoint directory, none is there"),
    ],
)
def test_what_is_wrong_in_itself_is_said_before_slow_work(run, student, files, tmp_path, monkeypatch, words, message):
    for name in ("load_model", "content_digest", "load_rows"):
        monkeypatch.setattr(runs, name, lambda *_, **__: pytest.fail("slow work"))
    status, _, error = run("score", *options(student, files), *words, "--out", tmp_path / "scores.parquet")
    assert status == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--learning-rate", "1e300"], "learning_rate=1e+300"),
        (["--batch-size", "6"], "batch_size=6: expected a multiple of per_device_train_batch_size=4"),
        (["--max-steps", "0"], "max_steps=0"),
        (["--student", "./nowhere"], "expected a checkpoint directory, none is there"),
    ],
)
def test_a_warmup_says_what_is_wrong_in_itself_before_slow_work(
    run, student, files, tmp_path, monkeypatch, words, message
):
    for name in ("load_model", "load_rows"):
        monkeypatch.setattr(cli, name, lambda *_, **__: pytest.fail("slow work"))
    words = ["--student", student, "--data", files["candidates"], "--out", tmp_path / "w", *words]
    status, _, error = run("warmup", *words)
    assert status == 2 and message in error and error.count("\n") == 1


def test_an_empty_name_is_not_the_directory_that_one_stands_in(run, student, files, tmp_path, monkeypatch):
    monkeypatch.chdir(files["candidates"].parent)
    status, _, error = run("score", *options(student, {**files, "candidates": ""}), "--out", tmp_path / "s.parquet")
    assert status == 2 and "--candidates: expected a path or a name, got an empty one" in error
    status, _, error = run("warmup", "--student", student, "--data", files["candidates"], "--out", "")
    assert status == 2 and "expected a folder, got an empty name" in error
    assert not list(Path.cwd().glob("checkpoint-*"))
    Path("round_1").mkdir()
    for words in (["run", "--preset", "demo", "--fresh"], ["generate", "--preset", "demo"], ["demo"]):
        status, _, error = run(*words, "--out", "")
        assert status == 2 and "expected a folder, got an empty name" in error
    assert Path("round_1").is_dir() and not Path("config.yaml").exists()


def test_bars_of_the_libraries_come_back_after_a_command(run, tmp_path, monkeypatch):
    def shown():
        return logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    seen = []
    monkeypatch.setattr(commands, "run", lambda *_, **__: seen.append(shown()))
    before = shown()
    assert before == (True, True)
    assert run("demo", "--out", tmp_path / "demo")[0] == 0
    assert seen == [(False, False)] and shown() == before


def test_reasons_of_many_invalid_rows_are_no_part_of_the_metadata(run, student, files, tmp_path):
    rows = [
        *make_text_rows(6),
        *[{"instruction": "say hello", "answer_text": "x" * 50}] * 400,
        *make_text_rows(6, seed=2),
    ]
    write(files["candidates"], "".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.parquet"
    assert run("score", *options(student, files), "--invalid-rows", "skip", "--out", out, "--quiet")[0] == 0
    scores = Scores.load(out)
    assert list(scores.info["invalid"]) == [str(row) for row in range(6, 406)]
    assert "expected the columns" in scores.info["invalid"]["17"]
    table = scores.to_table()
    assert len(table.schema.metadata[b"montessori"]) < 2000
    assert table["reason"].null_count == 12
    scores.save(tmp_path / "again.parquet")
    assert Scores.load(tmp_path / "again.parquet") == scores
