"""Whole rounds with a tiny teacher: every stage, resuming, changed settings, baselines, the command line."""

from __future__ import annotations

import datetime
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from loop_models import make_config, make_settings
from transformers import PreTrainedModel

from montessori.cli import cli
from montessori.data import load_rows
from montessori.errors import ArgumentError, DataError
from montessori.fingerprint import content_digest
from montessori.loop import round as loop
from montessori.loop import score, warmup
from montessori.loop.inputs import by_content
from montessori.loop.rundir import RunDirectory
from montessori.models import load_model
from montessori.templates import BUILT_IN_TEMPLATES


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return make_settings(tmp_path_factory.mktemp("material"))


def outputs(path: Path) -> dict[str, bytes]:
    """Everything that must repeat: all files but logs, times and pictures."""
    unstable = {
        "cost.json",
        "log.txt",
        "report.html",
        "lock",
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
    }
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name not in unstable and file.suffix != ".png"
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    page = loop.run(make_config(settings), path, progress=False)
    return path, page


def test_a_round_leaves_every_stage_done_and_a_report(finished):
    path, page = finished
    run = RunDirectory(path)
    assert page is not None and page.is_file()
    for stage in loop.STAGES:
        assert run.is_done(f"round_1/{stage}")
        assert run.costs()[f"round_1/{stage}"]["seconds"] >= 0
    for stage in ("generate", "warmup", "score", "tune", "regenerate", "train"):
        assert run.costs()[f"round_1/{stage}"]["tokens"] > 0
    assert list(run.costs()) == [f"round_1/{stage}" for stage in loop.STAGES]
    evaluation = json.loads((path / "round_1/evaluate/evaluation.json").read_text())
    assert {"student", "base"} <= evaluation["held_out"]["models"].keys()
    assert {"tuned", "untuned", "comparison"} <= evaluation["influence"].keys()
    assert len((path / "reference.jsonl").read_text().splitlines()) == 5
    assert len((path / "evaluation.jsonl").read_text().splitlines()) == 4


def test_no_model_outlives_its_stage(settings, tmp_path, monkeypatch):
    models, alive = weakref.WeakSet(), {}
    make = PreTrainedModel.__init__

    def noted(self, *args, **kwargs):
        models.add(self)
        make(self, *args, **kwargs)

    def counted(stage):
        def work(self, out):
            alive[stage.__name__] = len(models)
            return stage(self, out)

        return work

    monkeypatch.setattr(PreTrainedModel, "__init__", noted)
    for name in loop.STAGES:
        monkeypatch.setattr(loop.Round, name, counted(getattr(loop.Round, name)))
    gc.collect()
    gc.disable()
    try:
        loop.run(make_config(settings), tmp_path / "run", progress=False)
    finally:
        gc.enable()
    assert alive == dict.fromkeys(loop.STAGES, 0)
    assert not models


def test_the_same_config_twice_gives_the_same_bytes(settings, finished, tmp_path):
    loop.run(make_config(settings), tmp_path / "again", progress=False)
    first, second = outputs(finished[0]), outputs(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_finished_run_is_not_worked_on_again(settings, finished):
    path, _ = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.safetensors")}
    loop.run(make_config(settings), path, progress=False)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.safetensors")} == before


def test_changed_settings_of_a_finished_stage_are_named(settings, finished):
    path, _ = finished
    kept = (path / "config.yaml").read_bytes()
    with pytest.raises(ArgumentError, match=r"pairs: was made with another pairs\.margin \(0\.0, now 0\.5\)"):
        loop.run(
            make_config(settings, pairs={"rule": "difference", "per_prompt": 2, "margin": 0.5}), path, progress=False
        )
    with pytest.raises(ArgumentError, match=r"generate: was made with another seed \(1, now 2\)"):
        loop.run(make_config(settings, seed=2), path, progress=False)
    assert (path / "config.yaml").read_bytes() == kept


def test_a_run_that_came_to_its_bound_goes_on_under_a_higher_one(settings, finished, tmp_path):
    with pytest.raises(DataError, match=r"raise generate\.max_prompts"):
        loop.run(make_config(settings, generate={**settings["generate"], "max_prompts": 3}), tmp_path, progress=False)
    samples = (tmp_path / "round_1/generate/samples.jsonl").read_bytes()
    higher = make_config(settings, generate={**settings["generate"], "max_prompts": 400})
    loop.run(higher, tmp_path, until="generate", progress=False)
    assert (tmp_path / "round_1/generate/samples.jsonl").read_bytes().startswith(samples)
    assert (tmp_path / "round_1/generate/probe.jsonl").read_bytes() == (
        finished[0] / "round_1/generate/probe.jsonl"
    ).read_bytes()


def test_two_runs_in_one_directory(settings, tmp_path):
    with RunDirectory(tmp_path), pytest.raises(ArgumentError, match="another run works"):
        loop.run(make_config(settings), tmp_path, progress=False)


def test_until_stops_and_single_stages_go_on(settings, finished, tmp_path):
    assert loop.run(make_config(settings), tmp_path / "a", until="score", progress=False) is None
    run = RunDirectory(tmp_path / "a")
    assert run.is_done("round_1/score") and not run.exists("round_1/pairs")
    loop.run(make_config(settings), tmp_path / "a", only="pairs", progress=False)
    pairs = "round_1/pairs/pairs.jsonl"
    assert (tmp_path / "a" / pairs).read_bytes() == (finished[0] / pairs).read_bytes()
    with pytest.raises(ArgumentError, match="expected a finished stage"):
        loop.run(make_config(settings), tmp_path / "a", only="train", progress=False)


def test_a_stage_can_be_redone_with_what_comes_after_it(settings, finished, tmp_path):
    path, _ = finished
    shutil.copytree(path, tmp_path / "run")
    fewer = make_config(settings, pairs={"rule": "difference", "per_prompt": 1})
    with pytest.raises(ArgumentError, match=r"another pairs\.per_prompt.* montessori run --from round_1/pairs"):
        loop.run(fewer, tmp_path / "run", progress=False)
    loop.run(fewer, tmp_path / "run", since="round_1/pairs", progress=False)
    whole = loop.run(fewer, tmp_path / "whole", progress=False)
    assert whole is not None and outputs(tmp_path / "run") == outputs(tmp_path / "whole")


def test_a_single_stage_redone_leaves_nothing_made_from_the_old_one(settings, finished, tmp_path):
    path, _ = finished
    out = tmp_path / "run"
    shutil.copytree(path, out)
    with pytest.raises(ArgumentError, match="another seed"):
        loop.run(make_config(settings, seed=7), out, only="pairs", fresh=True, progress=False)
    assert outputs(out) == outputs(path)
    fewer = make_config(settings, pairs={"rule": "difference", "per_prompt": 1})
    loop.run(fewer, out, only="pairs", fresh=True, progress=False)
    assert sorted(entry.name for entry in (out / "round_1").iterdir()) == ["generate", "pairs", "score", "warmup"]
    loop.run(fewer, out, until="tune", progress=False)


def test_a_fresh_run_keeps_nothing_of_the_one_before(settings, finished, tmp_path, monkeypatch):
    path, _ = finished
    out = tmp_path / "run"
    shutil.copytree(path, out)
    shutil.copytree(path / "round_1", out / "round_2")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Round, "warmup", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.run(make_config(settings, rounds=2), out, fresh=True, progress=False)
    assert sorted(entry.name for entry in out.glob("round_*/*")) == ["generate", "warmup"]
    loop.run(make_config(settings), out, until="pairs", progress=False)


def test_a_judge_of_the_win_rate_alone_does_not_undo_the_pairs(settings, finished, tmp_path):
    path, _ = finished
    out = tmp_path / "run"
    shutil.copytree(path, out)
    judged = make_config(settings, judge={"model": settings["teacher"]})
    loop.run(judged, out, since="evaluate", progress=False)
    assert outputs(out / "round_1/tune") == outputs(path / "round_1/tune")


def test_a_judge_that_is_not_asked_undoes_nothing(settings, finished, tmp_path):
    path, _ = finished
    shutil.copytree(path, tmp_path / "run")
    loop.run(make_config(settings, judge={"model": settings["student"]}), tmp_path / "run", progress=False)
    assert outputs(tmp_path / "run/round_1") == outputs(path / "round_1")
    asked = {"judge": {"model": settings["student"]}, "evaluate": {**settings["evaluate"], "answers": {"count": 1}}}
    with pytest.raises(ArgumentError, match=r"evaluate: was made with another evaluate\.answers\.count"):
        loop.run(make_config(settings, **asked), tmp_path / "run", progress=False)


def test_a_stage_can_be_started_where_those_before_it_are_done(settings, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for stage in loop.STAGES[loop.STAGES.index("pairs") :]:
        shutil.rmtree(out / "round_1" / stage)
    with pytest.raises(ArgumentError, match=r"--from tune: .*round_1/pairs is not finished"):
        loop.run(make_config(settings), out, since="tune", progress=False)
    loop.run(make_config(settings), out, since="pairs", until="pairs", progress=False)
    assert outputs(out / "round_1/pairs") == outputs(finished[0] / "round_1/pairs")


def test_what_a_template_says_counts_not_where_it_lies(settings, tmp_path):
    (tmp_path / "own.jinja").write_text(BUILT_IN_TEMPLATES["chatml"])

    def go_on(name):
        responses = {**settings["responses"], "chat_template": str(tmp_path / name)}
        loop.run(make_config(settings, responses=responses), tmp_path / "run", until="generate", progress=False)

    go_on("own.jinja")
    (tmp_path / "own.jinja").rename(tmp_path / "moved.jinja")
    go_on("moved.jinja")
    (tmp_path / "moved.jinja").write_text("Another. " + BUILT_IN_TEMPLATES["chatml"])
    with pytest.raises(ArgumentError, match=r"generate: was made with another responses\.chat_template"):
        go_on("moved.jinja")


def test_inputs_hold_the_content_of_files_and_leave_names(tmp_path):
    for name in ("plain", "questions.jsonl", "task.yaml", "arc_easy"):
        (tmp_path / name).write_text(name)
    (tmp_path / "opponent").mkdir()
    (tmp_path / "opponent" / "config.json").write_text("{}")
    answers = {"opponent": str(tmp_path / "opponent"), "questions": str(tmp_path / "questions.jsonl"), "count": 3}
    kept = {"chat_template": str(tmp_path / "plain"), "stop": [str(tmp_path / "plain")]}
    tasks = [str(tmp_path / "task.yaml"), str(tmp_path / "arc_easy")]
    found = by_content({"answers": answers, "tasks": tasks, **kept})
    assert found == {
        "answers": {
            "opponent": content_digest(tmp_path / "opponent"),
            "questions": content_digest(tmp_path / "questions.jsonl"),
            "count": 3,
        },
        "tasks": [content_digest(tmp_path / "task.yaml"), tasks[1]],
        **kept,
    }
    elsewhere = {"opponent": "organisation/model", "questions": None}
    assert by_content(elsewhere) == elsewhere


def test_settings_of_the_scoring_reach_the_estimator(settings, finished):
    narrow = {"dtype": "bfloat16", "method": "first_order", "reference_dtype": "model", "sample": 0.5, "device": "cpu"}
    reference = load_rows(settings["data"]["reference"])
    checkpoint = warmup.checkpoint(finished[0] / "round_1/warmup")
    estimator = score.open_estimator(score.ScoreSettings(**narrow), checkpoint, reference, 0.7)
    assert {parameter.dtype for parameter in estimator.model.parameters()} == {torch.bfloat16}
    options = estimator.options
    assert (options.method, options.reference_dtype, options.sample) == ("first_order", "model", 0.5)
    assert options.max_grad_norm == 0.7


def test_the_untuned_baseline_has_no_tuning_stages(settings, tmp_path):
    plain = make_config(settings, teacher_mode="untuned")
    page = loop.run(plain, tmp_path, progress=False)
    assert page is not None
    assert sorted(folder.name for folder in (tmp_path / "round_1").iterdir()) == sorted(loop.UNTUNED_STAGES)
    with pytest.raises(ArgumentError, match="--until tune: expected one of regenerate, train, evaluate"):
        loop.run(plain, tmp_path, until="tune")
    # Its rows are those of the other setting.
    with pytest.raises(ArgumentError, match="optimise"):
        loop.run(make_config(settings, teacher_mode="untuned", optimise="response"), tmp_path)
    # Neither mode goes on from the other: found before the first stage.
    with pytest.raises(
        ArgumentError, match=r"another teacher_mode \('untuned', now 'tuned'\).*--from round_1/generate"
    ):
        loop.run(make_config(settings), tmp_path)
    loop.run(make_config(settings), tmp_path, since="generate", until="generate", progress=False)
    assert [folder.name for folder in (tmp_path / "round_1").iterdir()] == ["generate"]
    with pytest.raises(
        ArgumentError, match=r"another teacher_mode \('tuned', now 'untuned'\).*--from round_1/regenerate"
    ):
        loop.run(plain, tmp_path)
    loop.run(plain, tmp_path, since="regenerate", until="regenerate", progress=False)
    assert [folder.name for folder in (tmp_path / "round_1").iterdir()] == ["regenerate"]


def test_scores_are_of_the_rows_that_were_scored(settings, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    probe = tmp_path / "run/round_1/generate/probe.jsonl"
    probe.write_text("".join(reversed(probe.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match=r"probe\.jsonl: its rows are not those that .*score them again"):
        loop.run(make_config(settings), tmp_path / "run", since="pairs", progress=False)


def test_influence_of_new_rows_is_measured_as_that_of_candidates(settings, finished, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(loop.evaluate, "run", lambda *given, **options: seen.update(options))
    chosen = make_config(settings, score={"reference_weighting": "token_mean", "max_length": 48, "device": "cpu"})
    stage = loop.Round(chosen, RunDirectory(finished[0]), loop.Material.read(chosen), 1, None, False)
    stage.evaluate(tmp_path)
    expected = {"reference_weighting": "token_mean", "max_length": 48, "device": "cpu", "max_grad_norm": None}
    assert seen | expected == seen


def test_columns_that_nothing_reads_may_hold_anything(settings, tmp_path):
    rows = [json.loads(line) for line in Path(settings["data"]["reference"]).read_text().splitlines()]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    table |= {"made": [datetime.datetime(2026, 1, 2)] * len(rows), "raw": [b"\xff"] * len(rows)}
    pq.write_table(pa.table(table), tmp_path / "reference.parquet")
    data = {**settings["data"], "reference": str(tmp_path / "reference.parquet")}
    loop.run(make_config(settings, data=data), tmp_path / "run", until="generate", progress=False)
    kept = load_rows(tmp_path / "run/reference.jsonl")
    assert kept[0]["instruction"] == rows[0]["instruction"] and kept[0]["made"].startswith("2026-01-02")


def test_a_second_round_goes_on_from_the_teacher_of_the_first(settings, finished, tmp_path):
    path = tmp_path / "longer"
    shutil.copytree(finished[0], path)
    loop.run(make_config(settings, rounds=2), path, until="generate", progress=False)
    assert outputs(finished[0] / "round_1") == outputs(path / "round_1")
    first, second = ((path / f"round_{n}/generate/probe.jsonl").read_text() for n in (1, 2))
    assert json.loads(second.splitlines()[0])["id"].startswith("r2-")
    texts = [{json.loads(line)["completion"] for line in text.splitlines()} for text in (first, second)]
    assert not texts[0] & texts[1]
    given = json.loads((path / "round_2/generate/inputs.json").read_text())["teacher"]
    assert given == RunDirectory(path).digest("round_1/tune")


def test_a_random_signal_is_another_one_in_every_round(settings, finished, tmp_path, monkeypatch):
    path, seen = tmp_path / "random", []
    for number in (1, 2):
        shutil.copytree(finished[0] / "round_1", path / f"round_{number}")
    monkeypatch.setattr(loop.pairs, "run", lambda *given: seen.append(given[2]) or {"num_pairs": 0})
    random = make_config(settings, signal={"kind": "random"})
    for number in (1, 2):
        loop.Round(random, RunDirectory(path), None, number, None, False).pairs(tmp_path)
    assert len(seen[0].values) == len(seen[1].values) and not (seen[0].values == seen[1].values).any()


def test_responses_can_be_optimised(settings, tmp_path):
    changes = {"optimise": "response", "responses": {**settings["responses"], "samples": 2}}
    loop.run(make_config(settings, **changes), tmp_path, until="tune", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "round_1/pairs/pairs.jsonl").read_text().splitlines()]
    assert rows and all(row["prompt"].endswith("<|im_start|> assistant ") for row in rows)
    _, tokenizer = load_model(settings["teacher"])
    for row in rows:
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True) == row[side]


def test_the_command_line_runs_and_prints_costs(settings, finished):
    path, _ = finished
    result = CliRunner().invoke(cli, ["run", "--out", str(path), "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "round_1/score" in result.output and f"report: {path}/report.html" in result.output


CHILD = "import sys; from montessori.cli import main; sys.argv[0] = 'montessori'; main()"


@pytest.mark.parametrize(
    "sign",
    ["round_1/generate/samples.jsonl", "round_1/score/scores.journal.0.jsonl", "round_1/tune/checkpoints"],
)
@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(sign, settings, finished, tmp_path):
    """SIGKILL as soon as a stage has left its first trace on disk; then the same command."""
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, "run", str(tmp_path / "config.yaml"), "--out", str(out), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / sign).exists():
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not RunDirectory(out).is_done(str(Path(sign).parent))
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    first, second = outputs(finished[0]), outputs(out)
    assert [name for name in first if first[name] != second.get(name)] == []
