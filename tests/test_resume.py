"""A run that is killed and started again goes on and ends with the same bytes."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support import make_model, make_rows, make_text_rows, warm_optimizer

from montessori import InfluenceEstimator, ScoreJournal, cpu, ops, scorers
from montessori.errors import ResourceError, StateError
from montessori.losses import response_loss


@pytest.fixture
def warm():
    model = make_model("llama_tied")
    return model, warm_optimizer(model)


def score(warm, path, method="anchored", rows=None, **settings):
    estimator = InfluenceEstimator(*warm, make_rows(3), method=method, **settings)
    return estimator.score(rows or make_rows(10, seed=1), batch_tokens=24, journal=ScoreJournal(path))


def interrupt_after(monkeypatch, method, count):
    """The scorer raises KeyboardInterrupt after `count` groups."""
    kind = scorers.ExactScorer if method == "exact" else scorers.LinearScorer
    original, calls = kind.score, []

    def limited(self, group):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(group)
        return original(self, group)

    monkeypatch.setattr(kind, "score", limited)
    return calls


@pytest.mark.parametrize("method", ["anchored", "exact"])
def test_an_interrupted_run_goes_on_without_scoring_anything_twice(warm, method, tmp_path, monkeypatch):
    whole = score(warm, tmp_path / "whole.jsonl", method)
    batches = len((tmp_path / "whole.jsonl").read_bytes().splitlines()) - 2
    with monkeypatch.context() as patch:
        interrupt_after(patch, method, 2)
        with pytest.raises(KeyboardInterrupt):
            score(warm, tmp_path / "cut.jsonl", method)
    with (tmp_path / "cut.jsonl").open("ab") as file:
        file.write(b'{"index": [4, 7], "del')
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, method, -1)
        rest = score(warm, tmp_path / "cut.jsonl", method)
    assert len(calls) == batches - 2
    np.testing.assert_array_equal(rest.influence, whole.influence)
    files = [scores.save(tmp_path / f"{i}.parquet").read_bytes() for i, scores in enumerate((whole, rest))]
    assert files[0] == files[1]
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_journal_needs_no_model_pass(warm, tmp_path, monkeypatch):
    whole = score(warm, tmp_path / "journal.jsonl")
    calls = interrupt_after(monkeypatch, "anchored", -1)
    again = score(warm, tmp_path / "journal.jsonl")
    assert not calls
    np.testing.assert_array_equal(again.influence, whole.influence)
    assert again.drift == whole.drift


def test_a_journal_of_another_run_is_refused_by_what_differs(warm, tmp_path):
    path = tmp_path / "journal.jsonl"
    score(warm, path)
    content = path.read_bytes()
    with pytest.raises(StateError, match="other options"):
        score(warm, path, pilot=2)
    with pytest.raises(StateError, match="other batches, candidates, pilot;"):
        score(warm, path, rows=make_rows(9, seed=1))
    with pytest.raises(StateError, match="other model, optimizer state"):
        score((warm[0], warm_optimizer(warm[0])), path)
    assert path.read_bytes() == content


class Smoothed:
    """A loss with something of its own, however that is held."""

    def __init__(self, held):
        self.held = held

    def __call__(self, model, batch):
        return (1 + self.amount()) * response_loss(model, batch)

    def amount(self):
        held = self.held
        return float(held["amount"] if isinstance(held, dict) else held[0] if isinstance(held, list) else held)


def in_a_closure(held):
    return lambda model, batch: Smoothed(held)(model, batch)


@pytest.mark.parametrize("kept", [Smoothed, in_a_closure, lambda held: Smoothed(held).__call__])
@pytest.mark.parametrize("wrap", [float, lambda x: {"amount": x}, lambda x: [x], torch.tensor, np.array])
def test_a_journal_of_a_loss_that_holds_something_else_is_refused(warm, kept, wrap, tmp_path):
    path = tmp_path / "journal.jsonl"
    first = score(warm, path, loss_fn=kept(wrap(0.5)))
    assert score(warm, path, loss_fn=kept(wrap(0.5))) == first
    for role in ("loss_fn", "reference_loss_fn"):
        with pytest.raises(StateError, match=r"other (reference )?loss"):
            score(warm, path, **{"loss_fn": kept(wrap(0.5)), role: kept(wrap(0.25))})


def test_a_journal_of_rows_with_other_columns_is_refused(warm, tmp_path):
    def weighted(model, batch):
        return torch.tensor([row["worth"] for row in batch.rows]) * response_loss(model, batch)

    rows, path = [{**row, "worth": 1.0} for row in make_rows(5, seed=1)], tmp_path / "journal.jsonl"
    first = score(warm, path, rows=rows, loss_fn=weighted)
    assert score(warm, path, rows=rows, loss_fn=weighted) == first
    rows[3]["worth"] = 2.0
    with pytest.raises(StateError, match="other columns;"):
        score(warm, path, rows=rows, loss_fn=weighted)


@pytest.mark.parametrize("change", ["number", "buffer"])
def test_a_journal_of_a_model_that_computes_something_else_is_refused(warm, change, tmp_path):
    path = tmp_path / "journal.jsonl"
    score(warm, path)
    model = warm[0]
    if change == "number":
        model.model.norm.variance_epsilon *= 2
    else:
        model.model.rotary_emb.inv_freq *= 2
    with pytest.raises(StateError, match="other model;"):
        score(warm, path)


def test_a_journal_does_not_mind_where_the_model_came_from(warm, tmp_path):
    path = tmp_path / "journal.jsonl"
    want = score(warm, path)
    model = warm[0]
    model.name_or_path, model.warnings_issued = "../elsewhere", {"estimate_tokens": True}
    np.testing.assert_array_equal(score(warm, path).influence, want.influence)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels were not built")
def test_a_sample_of_another_machines_tiles_is_not_gone_on_with(warm, tmp_path, monkeypatch):
    model, path = warm[0].float(), tmp_path / "journal.jsonl"
    single = model, warm_optimizer(model)
    score(single, path, sample=0.5)
    score(single, path, sample=0.5)
    monkeypatch.setattr(cpu, "tiling", lambda: 7)
    with pytest.raises(StateError, match="other tiles;"):
        score(single, path, sample=0.5)


def test_other_kernels_do_not_go_on_either(warm, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    score(warm, path)
    monkeypatch.setattr(ops, "available_impls", lambda: ("triton", "reference"))
    with pytest.raises(StateError, match="other kernels;"):
        score(warm, path)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = ScoreJournal(path)
    journal.open({"model": "a"})
    journal.append({"index": [0]})
    # The next record does not fit as a whole.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"journal\.jsonl: cannot be written .*large"):
            journal.append({"index": [1]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.open({"model": "a"})
    assert journal.records == [{"index": [0]}]


def test_removing_a_journal_leaves_nothing(tmp_path):
    journal = ScoreJournal(tmp_path / "journal.jsonl")
    journal.remove()
    with journal.opened({"model": "a"}):
        journal.append({"index": [0]})
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_has_one_writer_and_says_when_it_is_damaged(tmp_path):
    path = tmp_path / "journal.jsonl"
    first, second = ScoreJournal(path), ScoreJournal(path)
    with first.opened({"model": "a"}):
        first.append({"index": [0]})
        with pytest.raises(StateError, match=r"journal\.jsonl: another process writes it"):
            second.open({"model": "a"})
        # As a run with --fresh would, under the feet of one that still writes.
        with pytest.raises(StateError, match=r"journal\.jsonl: another process writes it"):
            second.remove()
        assert path.exists()
    with second.opened({"model": "a"}):
        assert second.records == [{"index": [0]}]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][4:] + lines[1])
    with pytest.raises(StateError, match=r"line 2: is damaged"):
        first.open({"model": "a"})
    path.write_bytes(lines[1])
    with pytest.raises(StateError, match=r"line 1: is damaged"):
        first.open({"model": "a"})


def test_kill_9_during_the_command_and_the_same_command_again(student, tmp_path):
    candidates, reference = tmp_path / "candidates.jsonl", tmp_path / "reference.jsonl"
    for path, rows in ((candidates, make_text_rows(300, seed=1)), (reference, make_text_rows(4, seed=2))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(out):
        options = {"student": student, "optimizer": student, "candidates": candidates, "reference": reference}
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        main = "from montessori.cli import main; main()"
        return [sys.executable, "-c", main, "score", *flags, "--out", str(out), "--batch-tokens", "24", "--quiet"]

    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    subprocess.run(command(whole), check=True, capture_output=True)
    journal = tmp_path / "cut.parquet.journal.jsonl"
    process = subprocess.Popen(command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not cut.exists() and journal.exists()
    subprocess.run(command(cut), check=True, capture_output=True)
    assert cut.read_bytes() == whole.read_bytes()
    assert not journal.exists()
    again = subprocess.run(command(cut), check=True, capture_output=True, text=True)
    assert "is complete" in again.stderr
