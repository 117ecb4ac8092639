"""How weights are trained, by the student's training: schedule, tokens, kills, and what is kept."""

from __future__ import annotations

import shutil

import pytest
import torch
from loop_support import KilledError, distance, kill_after, make_generated, metrics, weights

from montessori.encoding import encode_rows
from montessori.errors import DataError, ModelError, ResourceError
from montessori.loop import fit, train
from montessori.loop.rows import student_rows
from montessori.loop.train import TrainSettings
from montessori.models import load_model
from montessori.writing import write_jsonl

BATCHES = {"learning_rate": 1e-3, "batch_size": 2, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def final_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("final") / "final.jsonl"
    write_jsonl(path, make_generated(6))
    return path


def test_the_schedule_warms_up_stays_and_decays(student, final_file, tmp_path):
    settings = TrainSettings(learning_rate=1e-3, batch_size=2, per_device_train_batch_size=2, max_steps=10)
    train.run(settings, student, final_file, tmp_path, seed=0, progress=False)
    rates = [entry["learning_rate"] for entry in metrics(tmp_path) if "learning_rate" in entry]
    assert rates == pytest.approx([1e-9, *[1e-3] * 5, 1e-3, 7.5e-4, 5e-4, 2.5e-4], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [({}, 700), ({"num_train_epochs": 3}, 2100), ({"num_train_epochs": 0.5}, 400), ({"max_steps": 10}, 1000)],
)
def test_the_tokens_of_a_run_are_those_of_its_steps(changes, tokens):
    """25 examples make 7 steps of an epoch, half of which are 4."""
    settings = TrainSettings(batch_size=4, per_device_train_batch_size=2, **changes)
    assert settings.tokens(25, 700) == tokens


def test_the_student_learns_the_responses_alone(student, final_file, tmp_path):
    settings = TrainSettings(learning_rate=3e-3, batch_size=4, per_device_train_batch_size=2, num_train_epochs=2)
    summary = train.run(settings, student, final_file, tmp_path, seed=0, progress=False)
    losses = [entry["loss"] for entry in metrics(tmp_path) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02 and summary["num_examples"] == 24
    model, tokenizer = load_model(tmp_path / train.STUDENT)
    rows = encode_rows(student_rows(final_file), tokenizer, max_length=1000)
    assert summary["tokens"] == 2 * sum(example.num_tokens for example in rows.examples)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and tokenizer.chat_template


def test_rows_without_a_token_to_learn_are_one_line(student, final_file, tmp_path):
    with pytest.raises(DataError, match=r"none of \d+ rows has a token to learn .*: raise train\.max_length"):
        train.run(TrainSettings(max_length=3), student, final_file, tmp_path, seed=1, progress=False)


def test_a_killed_training_goes_on_to_the_same_bytes(student, final_file, tmp_path, monkeypatch):
    settings = TrainSettings(learning_rate=1e-3, batch_size=4, per_device_train_batch_size=2)
    train.run(settings, student, final_file, tmp_path / "whole", seed=0, progress=False)
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(KilledError):
            train.run(settings, student, final_file, tmp_path / "cut", seed=0, progress=False)
    train.run(settings, student, final_file, tmp_path / "cut", seed=0, progress=False)
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_curves_of_a_tracker_outlive_the_checkpoints(student, final_file, tmp_path, monkeypatch):
    drop, curves = fit._drop_checkpoints, tmp_path / fit.CHECKPOINTS / fit.CURVES / "host"

    def with_curves(out):
        curves.mkdir(parents=True)
        (curves / "events.1").write_text("curve")
        drop(out)

    monkeypatch.setattr(fit, "_drop_checkpoints", with_curves)
    train.run(TrainSettings(**BATCHES), student, final_file, tmp_path, seed=0, progress=False)
    assert (tmp_path / fit.CURVES / "host" / "events.1").read_text() == "curve"
    assert not (tmp_path / fit.CHECKPOINTS).exists()


def test_a_full_disk_is_an_error_of_one_line(student, tmp_path, monkeypatch):
    model, tokenizer = load_model(student)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(ResourceError, match="is the disk full"):
        fit.save_model(model, tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_what_a_kill_left(student, tmp_path):
    model, tokenizer = load_model(student)
    shutil.copytree(student, tmp_path / ".model.partial")
    (tmp_path / "model").mkdir()
    fit.save_model(model, tokenizer, tmp_path / "model")
    assert distance(weights(tmp_path / "model"), weights(student)) == 0
    assert not (tmp_path / ".model.partial").exists()


def test_a_student_whose_weights_are_not_finite_is_none(student, final_file, tmp_path):
    wild = {"learning_rate": 1e30, "max_grad_norm": None, "num_train_epochs": 2}
    with pytest.raises(ModelError, match=r"student: training has led to weights that are not finite.*learning_rate"):
        train.run(TrainSettings(**BATCHES | wild), student, final_file, tmp_path, seed=0, progress=False)
    assert not (tmp_path / train.STUDENT).exists()
