"""Two processes under torchrun against one: the same results up to the order of sums."""

from __future__ import annotations

import json
from pathlib import Path

import loop_processes
import numpy as np
import pytest
from loop_support import make_generated, make_signal
from process_support import run_in_two_processes
from support import make_text_rows

from montessori.loop import pairs
from montessori.models import load_model
from montessori.scores import Scores
from montessori.writing import write_jsonl


@pytest.fixture(scope="module")
def results(student, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    rows = make_generated(5)
    pairs.run(pairs.PairSettings(), rows, make_signal([(-1) ** row["sibling"] for row in rows]), folder)
    write_jsonl(folder / "final.jsonl", rows)
    write_jsonl(folder / "reference.jsonl", make_text_rows(4, seed=9))
    one, two = folder / "one", folder / "two"
    loop_processes.work(str(student), folder, one)
    run_in_two_processes(loop_processes, student, folder, two)
    assert sorted(path.name for path in two.glob("rank_*")) == ["rank_0_of_2", "rank_1_of_2"]
    return one, two


@pytest.mark.parametrize("model", ["warmup/checkpoint-2", "tune/teacher", "train/student"])
def test_two_processes_train_the_same_weights(results, model):
    one, two = (load_model(out / model)[0].state_dict() for out in results)
    for name, weight in one.items():
        np.testing.assert_allclose(two[name].numpy(), weight.numpy(), atol=2e-5, err_msg=name)


def test_the_gathered_scores_equal_those_of_one_process(results):
    one, two = (Scores.load(out / "score" / "scores.parquet") for out in results)
    assert len(one) == 20 and one.ok.all() and two.ok.all()
    spread = float(np.abs(one.influence - one.drift).max())
    np.testing.assert_allclose(two.influence, one.influence, atol=1e-5 * spread + 1e-5 * np.abs(one.influence).max())
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-5)
    assert not list((results[1] / "score").glob("*journal*"))


def test_two_processes_log_the_same_losses(results):
    logs = [[json.loads(line) for line in (out / "tune" / "metrics.jsonl").read_text().splitlines()] for out in results]
    assert len(logs[0]) == len(logs[1])
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "eval_loss", "rewards/margins"):
            assert two.get(key) == pytest.approx(one.get(key), abs=1e-5), key
