"""The directory of a run: one worker at a time, finished stages, changed inputs, costs."""

from __future__ import annotations

import time

import pytest

from montessori.errors import ArgumentError, ResourceError
from montessori.fingerprint import content_digest
from montessori.loop import round as loop
from montessori.loop import rundir
from montessori.loop.config import read_config
from montessori.loop.rundir import RunDirectory
from montessori.writing import write_json


def work(path, inputs, tokens=0, fresh=False, fail=False):
    """Run a stage that writes its inputs; returns whether it worked."""
    with RunDirectory(path) as run:
        if fresh:
            run.drop("round_1/pairs")
        with run.stage("round_1/pairs", inputs) as stage:
            if stage.done:
                return False
            (stage.path / "out.txt").write_text(str(inputs))
            if fail:
                raise KeyError("pulled plug")
            stage.tokens = tokens
            return True


def stop_unless_absent(path, **_):
    if path.exists():
        raise KeyboardInterrupt


def test_a_finished_stage_is_not_done_again(tmp_path):
    assert work(tmp_path, {"a": {"b": 1}})
    assert not work(tmp_path, {"a": {"b": 1}})
    assert work(tmp_path, {"a": {"b": 1}}, fresh=True)


def test_a_kill_while_a_stage_is_dropped_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    work(tmp_path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(rundir.shutil, "rmtree", stop_unless_absent)
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path, {"a": 2}, fresh=True)
    assert not RunDirectory(tmp_path).is_done("round_1/pairs")
    assert work(tmp_path, {"a": 2})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dropped", ["round_2", "round_2/tune"])
def test_what_shows_a_dropped_stage_goes_with_it(dropped, tmp_path):
    (tmp_path / "round_2/tune").mkdir(parents=True)
    for name in ("round_1_influence.png", "round_2_influence.png", "round_2_training_losses.png", "report.html"):
        (tmp_path / name).touch()
    with RunDirectory(tmp_path) as run:
        run.drop(dropped)
    assert {path.name for path in tmp_path.iterdir()} - {"lock", "round_2"} == {"round_1_influence.png"}


def test_folders_that_only_begin_like_a_round_are_none(tmp_path):
    for name in ("round_10", "round_2", "round_1_old"):
        (tmp_path / name).mkdir()
    assert [path.name for path in RunDirectory(tmp_path).rounds()] == ["round_2", "round_10"]


def test_changed_inputs_are_named(tmp_path):
    work(tmp_path, {"pairs": {"rule": "sign", "margin": 0.0}})
    with pytest.raises(ArgumentError, match=r"another pairs\.rule \('sign', now 'centred'\)"):
        work(tmp_path, {"pairs": {"rule": "centred", "margin": 0.0}})
    with pytest.raises(ArgumentError, match=r"another pairs\.top_k"):
        work(tmp_path, {"pairs": {"rule": "sign", "margin": 0.0, "top_k": 3}})
    assert work(tmp_path, {"pairs": {"rule": "centred"}}, fresh=True)


def fail_at_once(stage):
    (stage.path / "empty").mkdir()
    raise KeyError("too short")


def test_a_stage_that_failed_before_it_wrote_takes_other_inputs(tmp_path):
    with pytest.raises(KeyError), RunDirectory(tmp_path) as run, run.stage("round_1/pairs", {"a": 1}) as stage:
        fail_at_once(stage)
    RunDirectory(tmp_path).check("round_1/pairs", {"a": 2})
    assert work(tmp_path, {"a": 2})
    assert "too short" in (tmp_path / "round_1/pairs/log.txt").read_text()
    assert not work(tmp_path, {"a": 2})


def test_a_stage_cut_short_is_not_done_and_keeps_its_files_and_time(tmp_path):
    with pytest.raises(KeyError):
        work(tmp_path, {"a": 1}, fail=True)
    run = RunDirectory(tmp_path)
    assert not run.is_done("round_1/pairs")
    assert (tmp_path / "round_1/pairs/out.txt").exists()
    before = run.costs()["round_1/pairs"]
    with pytest.raises(ArgumentError, match="another a"):
        work(tmp_path, {"a": 2})
    assert work(tmp_path, {"a": 1}, tokens=7)
    after = run.costs()["round_1/pairs"]
    assert after["tokens"] == 7 and after["started"] == before["started"] and after["seconds"] >= before["seconds"]
    assert "pulled plug" in (tmp_path / "round_1/pairs/log.txt").read_text()


def test_time_is_kept_while_a_stage_works_so_that_a_kill_loses_little(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "_SECONDS_BETWEEN_COSTS", 0.01)
    with RunDirectory(tmp_path / "run") as run, run.stage("round_1/pairs", {}):
        deadline = time.monotonic() + 60
        while not run.costs() or run.costs()["round_1/pairs"]["seconds"] < 0.05:
            assert time.monotonic() < deadline
        before = run.costs()["round_1/pairs"]
        assert before["seconds"] >= 0.05 and not run.is_done("round_1/pairs")
    # As a kill at that moment would have left it.
    write_json(tmp_path / "killed/round_1/pairs/cost.json", before)
    assert work(tmp_path / "killed", {}, tokens=7)
    after = RunDirectory(tmp_path / "killed").costs()["round_1/pairs"]
    assert after["tokens"] == 7 and after["started"] == before["started"] and after["seconds"] >= before["seconds"]


def test_digests_follow_inputs_alone(tmp_path):
    for name, inputs in (("x", {"a": 1}), ("y", {"a": 1}), ("z", {"a": 2})):
        work(tmp_path / name, inputs)
    digests = [RunDirectory(tmp_path / name).digest("round_1/pairs") for name in "xyz"]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(ArgumentError, match="expected a finished stage"):
        RunDirectory(tmp_path / "x").digest("round_1/tune")


@pytest.mark.parametrize(
    ("done", "options", "message"),
    [
        (0, {"since": "pairs"}, r"--from pairs: expected the stages before it, but .*round_1/generate is not finished"),
        (2, {"since": "pairs"}, r"--from pairs: expected the stages before it, but .*round_1/score is not finished"),
        (8, {"since": "tune", "until": "pairs"}, r"--until pairs: expected --from tune or a stage after it"),
        (8, {"since": "round_1/tune", "until": "pairs"}, r"--until pairs: expected --from tune or a stage after it"),
        (8, {"since": "round_2/tune"}, r"--from round_2/tune: expected a stage, or round_N/stage with N from 1 to 1"),
        (8, {"since": "first/tune"}, r"--from first/tune: expected a stage, or round_N/stage"),
        (8, {"since": "round_1/rest"}, r"--from rest: expected one of generate"),
        (8, {"since": "pairs", "fresh": True}, r"--from pairs with --fresh, .*: expected one of the two"),
    ],
)
def test_a_range_of_stages_that_cannot_be_run_is_refused_and_leaves_what_is_there(done, options, message, tmp_path):
    for stage in loop.STAGES[:done]:
        with RunDirectory(tmp_path / "run") as run, run.stage(f"round_1/{stage}", {}):
            pass
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArgumentError, match=message):
        loop.run(read_config(preset="demo"), tmp_path / "run", progress=False, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_run_at_a_time(tmp_path):
    with RunDirectory(tmp_path), pytest.raises(ArgumentError, match="another run works"), RunDirectory(tmp_path):
        pass
    with RunDirectory(tmp_path):
        pass


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"), RunDirectory(tmp_path / "file"):
        pass


def test_content_digest_sees_names_and_contents(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.bin").write_bytes(b"1")
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")
    (tmp_path / "b" / "w.bin").write_bytes(b"2")
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")
    (tmp_path / "b" / "w.bin").rename(tmp_path / "b" / "v.bin")
    with pytest.raises(ArgumentError, match="expected a file"):
        content_digest(tmp_path / "absent")


def test_content_that_changed_is_named_by_its_settings(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        with run.stage("round_1/score", {"reference": "a" * 64}) as stage:
            (stage.path / "some.jsonl").write_text("{}")
        with (
            pytest.raises(ArgumentError, match=r"with another reference \(other content: data.reference or data.refer"),
            run.stage("round_1/score", {"reference": "b" * 64}),
        ):
            pass
