"""Whole rounds with a tiny teacher: every stage, resuming, changed settings, baselines, the command line."""

from __future__ import annotations

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

import pytest
import torch
from click.testing import CliRunner
from loop_models import make_teacher
from support import make_text_rows
from transformers import PreTrainedModel

from montessori.cli import cli
from montessori.data import load_rows
from montessori.errors import ArgumentError, DataError, ModelError
from montessori.fingerprint import content_digest
from montessori.loop import round as loop
from montessori.loop import score, warmup
from montessori.loop.config import Config
from montessori.loop.files import write_jsonl
from montessori.loop.inputs import by_content
from montessori.loop.preflight import check_config
from montessori.loop.rundir import RunDirectory
from montessori.models import load_model
from montessori.templates import BUILT_IN_TEMPLATES


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Plain settings of a run of seconds."""
    path = tmp_path_factory.mktemp("material")
    seeds = [{"instruction": f"Seed task {word} about {word}ing {word}s"} for word in "abcdefgh"]
    write_jsonl(path / "seeds.jsonl", seeds)
    write_jsonl(path / "reference.jsonl", make_text_rows(9, seed=3))
    sampling = {"presence_penalty": 0.0, "top_p": 1.0, "max_new_tokens": 60}
    training = {"learning_rate": 1e-3, "batch_size": 4, "per_device_train_batch_size": 2}
    return {
        "seed": 1,
        "teacher": str(make_teacher(path / "teacher", seed=1)),
        "student": str(make_teacher(path / "student", seed=2)),
        "data": {
            "seeds": str(path / "seeds.jsonl"),
            "reference": str(path / "reference.jsonl"),
            "reference_rows": 5,
        },
        "engine": {"batch_size": 8, "device": "cpu"},
        "generate": {
            "style": "completion",
            "seed_examples": 2,
            "own_examples": 1,
            "prompts_per_wave": 3,
            "sampling": sampling,
        },
        "responses": {"sampling": {**sampling, "max_new_tokens": 12}},
        "split": {"warmup": 8, "probe": 16, "final": 8},
        "warmup": training,
        "score": {"device": "cpu"},
        "pairs": {"rule": "difference", "per_prompt": 2},
        "tune": {**training, "batch_size": 2},
        "train": training,
        "evaluate": {"sample": 2, "resamples": 100},
    }


def config(settings, **changes):
    return Config.read({**settings, **changes}, "test")


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
    page = loop.run(config(settings), path, progress=False)
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
        loop.run(config(settings), tmp_path / "run", progress=False)
    finally:
        gc.enable()
    assert alive == dict.fromkeys(loop.STAGES, 0)
    assert not models


def test_the_same_config_twice_gives_the_same_bytes(settings, finished, tmp_path):
    loop.run(config(settings), tmp_path / "again", progress=False)
    first, second = outputs(finished[0]), outputs(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_finished_run_is_not_worked_on_again(settings, finished):
    path, _ = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.safetensors")}
    loop.run(config(settings), path, progress=False)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.safetensors")} == before


def test_changed_settings_of_a_finished_stage_are_named(settings, finished):
    path, _ = finished
    kept = (path / "config.yaml").read_bytes()
    with pytest.raises(ArgumentError, match=r"pairs: was made with another pairs\.margin \(0\.0, now 0\.5\)"):
        loop.run(config(settings, pairs={"rule": "difference", "per_prompt": 2, "margin": 0.5}), path, progress=False)
    with pytest.raises(ArgumentError, match=r"generate: was made with another seed \(1, now 2\)"):
        loop.run(config(settings, seed=2), path, progress=False)
    assert (path / "config.yaml").read_bytes() == kept


def test_a_run_that_came_to_its_bound_goes_on_under_a_higher_one(settings, finished, tmp_path):
    with pytest.raises(DataError, match=r"raise generate\.max_prompts"):
        loop.run(config(settings, generate={**settings["generate"], "max_prompts": 3}), tmp_path, progress=False)
    samples = (tmp_path / "round_1/generate/samples.jsonl").read_bytes()
    higher = config(settings, generate={**settings["generate"], "max_prompts": 400})
    loop.run(higher, tmp_path, until="generate", progress=False)
    assert (tmp_path / "round_1/generate/samples.jsonl").read_bytes().startswith(samples)
    assert (tmp_path / "round_1/generate/probe.jsonl").read_bytes() == (
        finished[0] / "round_1/generate/probe.jsonl"
    ).read_bytes()


def test_two_runs_in_one_directory(settings, tmp_path):
    with RunDirectory(tmp_path), pytest.raises(ArgumentError, match="another run works"):
        loop.run(config(settings), tmp_path, progress=False)


def test_until_stops_and_single_stages_go_on(settings, finished, tmp_path):
    assert loop.run(config(settings), tmp_path / "a", until="score", progress=False) is None
    run = RunDirectory(tmp_path / "a")
    assert run.is_done("round_1/score") and not run.exists("round_1/pairs")
    loop.run(config(settings), tmp_path / "a", only="pairs", progress=False)
    pairs = "round_1/pairs/pairs.jsonl"
    assert (tmp_path / "a" / pairs).read_bytes() == (finished[0] / pairs).read_bytes()
    with pytest.raises(ArgumentError, match="expected a finished stage"):
        loop.run(config(settings), tmp_path / "a", only="train", progress=False)


def test_a_stage_can_be_redone_with_what_comes_after_it(settings, finished, tmp_path):
    path, _ = finished
    shutil.copytree(path, tmp_path / "run")
    fewer = config(settings, pairs={"rule": "difference", "per_prompt": 1})
    with pytest.raises(ArgumentError, match=r"another pairs\.per_prompt.* montessori run --from pairs"):
        loop.run(fewer, tmp_path / "run", progress=False)
    loop.run(fewer, tmp_path / "run", since="pairs", progress=False)
    whole = loop.run(fewer, tmp_path / "whole", progress=False)
    assert whole is not None and outputs(tmp_path / "run") == outputs(tmp_path / "whole")


def test_a_single_stage_redone_leaves_nothing_made_from_the_old_one(settings, finished, tmp_path):
    path, _ = finished
    out = tmp_path / "run"
    shutil.copytree(path, out)
    with pytest.raises(ArgumentError, match="another seed"):
        loop.run(config(settings, seed=7), out, only="pairs", fresh=True, progress=False)
    assert outputs(out) == outputs(path)
    fewer = config(settings, pairs={"rule": "difference", "per_prompt": 1})
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
            loop.run(config(settings, rounds=2), out, fresh=True, progress=False)
    assert sorted(entry.name for entry in out.glob("round_*/*")) == ["generate", "warmup"]
    loop.run(config(settings), out, until="pairs", progress=False)


def test_a_judge_of_the_win_rate_alone_does_not_undo_the_pairs(settings, finished, tmp_path):
    path, _ = finished
    out = tmp_path / "run"
    shutil.copytree(path, out)
    judged = config(settings, judge={"model": settings["teacher"]})
    loop.run(judged, out, since="evaluate", progress=False)
    assert outputs(out / "round_1/tune") == outputs(path / "round_1/tune")


@pytest.mark.parametrize("key", ["student", "judge", "opponent"])
def test_a_checkpoint_that_is_not_there_is_missed_before_anything_is_written(key, settings, tmp_path):
    absent = str(tmp_path / "absent")
    changes = {
        "student": {"student": absent},
        "judge": {"judge": {"model": absent}},
        "opponent": {"evaluate": {"answers": {"count": 1, "opponent": absent}}},
    }[key]
    with pytest.raises(ModelError, match="absent: expected a checkpoint directory"):
        loop.run(config(settings, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": {"device": "cuda:99"}}, "score.device=cuda:99: expected auto, cpu"),
        ({"warmup": {"max_steps": 0}}, "warmup.max_steps=0: expected at least 1"),
        ({"engine": {"device": "toaster"}}, "engine.device=toaster: expected auto, cpu"),
        ({"score": {"backend": "abacus"}}, "score.backend: .*abacus"),
        ({"train": {"chat_template": "nowhere.jinja"}}, "train.chat_template, .*student: .*nowhere.jinja"),
        ({"responses": {"chat_template": "none"}}, "responses.chat_template, .*teacher: .*none.*expected a template"),
    ],
)
def test_what_a_late_stage_cannot_use_is_named_before_the_first(changes, message, settings, tmp_path):
    with pytest.raises(ArgumentError if "nowhere" not in message else DataError, match=message):
        loop.run(config(settings, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_stage_can_be_started_where_those_before_it_are_done(settings, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for stage in loop.STAGES[loop.STAGES.index("pairs") :]:
        shutil.rmtree(out / "round_1" / stage)
    with pytest.raises(ArgumentError, match=r"--from tune: .*round_1/pairs is not finished"):
        loop.run(config(settings), out, since="tune", progress=False)
    loop.run(config(settings), out, since="pairs", until="pairs", progress=False)
    assert outputs(out / "round_1/pairs") == outputs(finished[0] / "round_1/pairs")


def test_batch_sizes_that_the_devices_cannot_share_are_named_before_the_first_stage(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    tune = {**settings["tune"], "batch_size": 6}
    with pytest.raises(ArgumentError, match=r"tune\.batch_size=6: expected a multiple of 4, .*=2 on each of 2 devices"):
        loop.run(config(settings, tune=tune), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_within_what_it_reads_is_refused(settings, tmp_path):
    inside = tmp_path / "student" / "run"
    shutil.copytree(settings["student"], inside.parent)
    with pytest.raises(ArgumentError, match=r"--out .*outside of .*student, which student reads"):
        loop.run(config(settings, student=str(inside.parent)), inside, progress=False)
    assert not inside.exists()


def test_evaluation_rows_that_do_not_fit_are_named_before_the_first_stage(settings, tmp_path):
    reference = [json.loads(line) for line in Path(settings["data"]["reference"]).read_text().splitlines()]
    reference[7]["instruction"] = "a colour " * 60
    write_jsonl(tmp_path / "reference.jsonl", reference)
    data = {**settings["data"], "reference": str(tmp_path / "reference.jsonl")}
    short = {**settings["score"], "max_length": 100}
    with pytest.raises(DataError, match=r"reference\.jsonl, line 8: no_label_tokens; every held-out row must count"):
        loop.run(config(settings, data=data, score=short), tmp_path / "run", progress=False)
    answers = {**settings["evaluate"], "answers": {"count": 3}}
    engine = {**settings["engine"], "max_length": 100}
    with pytest.raises(DataError, match=r"reference\.jsonl, line 8: the instruction leaves no room .* 100 tokens"):
        loop.run(config(settings, data=data, evaluate=answers, engine=engine), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_student_without_a_chat_template_is_found_before_the_first_stage(settings, tmp_path):
    shutil.copytree(settings["student"], tmp_path / "base")
    _model, tokenizer = load_model(settings["student"])
    tokenizer.chat_template = None
    for file in (tmp_path / "base").glob("*.jinja"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    given = {"student": str(tmp_path / "base")}
    with pytest.raises(DataError, match=r"warmup\.chat_template, .*base: the tokenizer has no chat template; set"):
        loop.run(config(settings, **given), tmp_path / "run", progress=False)
    for template in ("plain", "none"):
        changes = {name: {**settings.get(name, {}), "chat_template": template} for name in ("warmup", "score", "train")}
        check_config(config(settings, **given, **changes))


def test_evaluation_rows_in_the_reference_are_refused(settings, tmp_path):
    data = {**settings["data"], "evaluation": settings["data"]["reference"]}
    with pytest.raises(DataError, match=r"5 of 9 evaluation rows are also in the reference"):
        loop.run(config(settings, data=data), tmp_path / "run", progress=False)


def test_what_a_template_says_counts_not_where_it_lies(settings, tmp_path):
    (tmp_path / "own.jinja").write_text(BUILT_IN_TEMPLATES["chatml"])

    def go_on(name):
        responses = {**settings["responses"], "chat_template": str(tmp_path / name)}
        loop.run(config(settings, responses=responses), tmp_path / "run", until="generate", progress=False)

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
    plain = config(settings, teacher_mode="untuned")
    page = loop.run(plain, tmp_path, progress=False)
    assert page is not None
    assert sorted(folder.name for folder in (tmp_path / "round_1").iterdir()) == sorted(loop.UNTUNED_STAGES)
    with pytest.raises(ArgumentError, match="--until tune: expected one of regenerate, train, evaluate"):
        loop.run(plain, tmp_path, until="tune")


def test_a_second_round_goes_on_from_the_teacher_of_the_first(settings, finished, tmp_path):
    path = tmp_path / "longer"
    shutil.copytree(finished[0], path)
    loop.run(config(settings, rounds=2), path, until="generate", progress=False)
    assert outputs(finished[0] / "round_1") == outputs(path / "round_1")
    first, second = ((path / f"round_{n}/generate/probe.jsonl").read_text() for n in (1, 2))
    assert json.loads(second.splitlines()[0])["id"].startswith("r2-")
    texts = [{json.loads(line)["completion"] for line in text.splitlines()} for text in (first, second)]
    assert not texts[0] & texts[1]
    given = json.loads((path / "round_2/generate/inputs.json").read_text())["teacher"]
    assert given == RunDirectory(path).digest("round_1/tune")


def test_responses_can_be_optimised(settings, tmp_path):
    changes = {"optimise": "response", "responses": {**settings["responses"], "samples": 2}}
    loop.run(config(settings, **changes), tmp_path, until="tune", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "round_1/pairs/pairs.jsonl").read_text().splitlines()]
    assert rows and all(row["prompt"].endswith("<|im_start|> assistant ") for row in rows)
    _, tokenizer = load_model(settings["teacher"])
    for row in rows:
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True) == row[side]


def test_seeds_in_the_evaluation_set_are_refused(settings, tmp_path):
    data = {**settings["data"], "seeds": settings["data"]["reference"]}
    with pytest.raises(DataError, match=r"9 of 9 seeds are also in the reference or evaluation set"):
        loop.run(config(settings, data=data), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_reference_without_rows_left_to_evaluate_on(settings, tmp_path):
    data = {**settings["data"], "reference_rows": 9}
    with pytest.raises(DataError, match=r"9 rows and data\.reference_rows=9 leave none"):
        loop.run(config(settings, data=data), tmp_path, progress=False)


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
