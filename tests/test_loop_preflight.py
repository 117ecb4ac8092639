"""What would fail late is found before the first stage, and before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loop_models import make_config, make_settings
from support import make_model

from montessori.errors import ArgumentError, DataError, ModelError
from montessori.loop import round as loop
from montessori.loop.preflight import check_config
from montessori.loop.rows import length_limit
from montessori.models import load_tokenizer
from montessori.writing import write_jsonl


def without_template(student, path: Path) -> str:
    """A copy of the checkpoint whose tokenizer has no chat template."""
    shutil.copytree(student, path)
    tokenizer = load_tokenizer(student)
    tokenizer.chat_template = None
    for file in path.glob("*.jinja"):
        file.unlink()
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return make_settings(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("key", ["student", "judge", "opponent"])
def test_a_checkpoint_that_is_not_there_is_missed_before_anything_is_written(key, settings, tmp_path):
    absent = str(tmp_path / "absent")
    changes = {
        "student": {"student": absent},
        "judge": {"judge": {"model": absent}},
        "opponent": {"evaluate": {"answers": {"count": 1, "opponent": absent}}},
    }[key]
    with pytest.raises(ModelError, match="absent: expected a checkpoint directory"):
        loop.run(make_config(settings, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": {"device": "cuda:99"}}, "score.device=cuda:99: expected auto, cpu"),
        ({"warmup": {"max_steps": 0}}, "warmup.max_steps=0: expected at least 1"),
        ({"engine": {"device": "toaster"}}, "engine.device=toaster: expected auto, cpu"),
        ({"score": {"backend": "abacus"}}, "score.backend='abacus': expected"),
        ({"train": {"chat_template": "nowhere.jinja"}}, "train.chat_template, .*student: .*nowhere.jinja"),
        ({"train": {"report_to": ["abacus"]}}, "train.report_to=abacus: expected some of"),
        ({"tune": {"report_to": ["clearml"]}}, "tune.report_to=clearml: it is not installed: pip install clearml"),
        (
            {"judge": {"model": "someone/judge", "engine": {"device": "toaster"}}, "signal": {"kind": "judge"}},
            "judge.engine.device=toaster: expected auto, cpu",
        ),
        ({"score": {"sample": 0.5, "backend": "reference"}}, "backend='reference' with sample < 1"),
        ({"signal": {"prefer": "low"}}, "prefer=low: expected kind=training_loss"),
        ({"generate": {"filters": {"min_characters": 500}}}, "min_characters=500: expected at most max_characters=400"),
        ({"responses": {"chat_template": "none"}}, "responses.chat_template, .*teacher: .*none.*expected a template"),
    ],
)
def test_what_a_late_stage_cannot_use_is_named_before_the_first(changes, message, settings, tmp_path):
    with pytest.raises(ArgumentError if "nowhere" not in message else DataError, match=message):
        loop.run(make_config(settings, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_template_of_the_judge_is_named_before_the_first_stage(settings, tmp_path):
    judge = {"model": settings["student"], "chat_template": "nowhere.jinja"}
    unused = make_config(settings, judge=judge)
    check_config(unused)
    with pytest.raises(DataError, match=r"judge\.chat_template, .*student: .*nowhere\.jinja"):
        check_config(make_config(settings, judge=judge, signal={"kind": "judge"}))


def test_a_judge_of_nothing_is_not_looked_at(settings):
    judge = {"model": settings["student"], "chat_template": "nowhere.jinja", "engine": {"device": "toaster"}}
    check_config(make_config(settings, judge=judge, evaluate={"answers": {"questions": "question.jsonl"}}))
    with pytest.raises(ArgumentError, match=r"judge\.engine\.device=toaster"):
        check_config(make_config(settings, judge=judge, evaluate={"answers": {"count": 1}}))


@pytest.mark.parametrize("section", ["warmup", "score", "train", "generate", "responses", "judge"])
def test_a_template_that_fails_on_every_chat_is_named_before_the_first_stage(section, settings):
    broken = "{% for m in messages %}{{ m.content }}{% endif %}"
    changes = {section: {**settings.get(section, {}), "chat_template": broken}}
    if section == "judge":
        changes = {"judge": {"model": settings["student"], "chat_template": broken}, "signal": {"kind": "judge"}}
    if section == "generate":
        changes["generate"]["style"] = "chat"
    with pytest.raises(DataError, match=rf"^{section}\.chat_template, .*the chat template fails on it .*endif"):
        check_config(make_config(settings, **changes))


def test_a_question_that_does_not_fit_is_named_before_the_first_stage(settings, tmp_path):
    write_jsonl(tmp_path / "question.jsonl", [{"question_id": 1, "turns": ["what " * 300]}])
    evaluate = {**settings["evaluate"], "answers": {"questions": str(tmp_path / "question.jsonl")}}
    with pytest.raises(DataError, match=r"question\.jsonl, line 1: the question leaves no room"):
        loop.run(make_config(settings, evaluate=evaluate), tmp_path / "run", progress=False)


def test_an_opponent_without_a_chat_template_is_named_before_the_first_stage(settings, tmp_path):
    opponent = without_template(settings["student"], tmp_path / "opponent")
    with pytest.raises(
        DataError, match=r"evaluate\.answers\.chat_template, .*opponent: the tokenizer has no chat temp"
    ):
        check_config(make_config(settings, evaluate={"answers": {"count": 1, "opponent": opponent}}))
    check_config(make_config(settings, evaluate={"answers": {"opponent": opponent}}))


@pytest.mark.parametrize("section", ["warmup", "train", "tune", "score"])
def test_more_tokens_than_a_model_has_positions_are_named_by_their_setting(section):
    model = make_model("gpt2", torch.float32)
    limit = model.config.max_position_embeddings
    with pytest.raises(
        ArgumentError, match=f"^{section}.max_length={limit + 1}: expected at most {limit}, the positions"
    ):
        length_limit(model, limit + 1, section)
    assert length_limit(model, limit, section) == length_limit(model, None, section) == limit


def test_a_tokenizer_that_ends_no_text_is_named_before_the_first_stage(settings, tmp_path):
    shutil.copytree(settings["student"], tmp_path / "student")
    file = tmp_path / "student" / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("eos_token", "pad_token")}
    file.write_text(json.dumps(kept))
    (tmp_path / "student" / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="student: its tokenizer has neither pad_token nor eos_token"):
        loop.run(make_config(settings, student=str(tmp_path / "student")), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_batch_sizes_that_the_devices_cannot_share_are_named_before_the_first_stage(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    tune = {**settings["tune"], "batch_size": 6}
    with pytest.raises(ArgumentError, match=r"tune\.batch_size=6: expected a multiple of 4, .*=2 on each of 2 devices"):
        loop.run(make_config(settings, tune=tune), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_within_what_it_reads_is_refused(settings, tmp_path):
    inside = tmp_path / "student" / "run"
    shutil.copytree(settings["student"], inside.parent)
    with pytest.raises(ArgumentError, match=r"--out .*outside of .*student, which student reads"):
        loop.run(make_config(settings, student=str(inside.parent)), inside, progress=False)
    assert not inside.exists()


def test_evaluation_rows_that_do_not_fit_are_named_before_the_first_stage(settings, tmp_path):
    reference = [json.loads(line) for line in Path(settings["data"]["reference"]).read_text().splitlines()]
    reference[7]["instruction"] = "a colour " * 60
    write_jsonl(tmp_path / "reference.jsonl", reference)
    data = {**settings["data"], "reference": str(tmp_path / "reference.jsonl")}
    short = {**settings["score"], "max_length": 100}
    with pytest.raises(DataError, match=r"reference\.jsonl, line 8: no_label_tokens; every held-out row must count"):
        loop.run(make_config(settings, data=data, score=short), tmp_path / "run", progress=False)
    answers = {**settings["evaluate"], "answers": {"count": 3}}
    engine = {**settings["engine"], "max_length": 100}
    with pytest.raises(DataError, match=r"reference\.jsonl, line 8: the instruction leaves no room .* 100 tokens"):
        loop.run(make_config(settings, data=data, evaluate=answers, engine=engine), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_row_of_a_folder_that_does_not_fit_is_named_by_its_file(settings, tmp_path):
    rows = [json.loads(line) for line in Path(settings["data"]["reference"]).read_text().splitlines()]
    rows[7]["instruction"] = "a colour " * 60
    for name, some in (("a", rows[:6]), ("b", rows[6:])):
        write_jsonl(tmp_path / "reference" / f"{name}.jsonl", some)
    data = {**settings["data"], "reference": str(tmp_path / "reference")}
    score = {**settings["score"], "max_length": 100}
    with pytest.raises(DataError, match=r"reference/b\.jsonl, line 2: no_label_tokens"):
        loop.run(make_config(settings, data=data, score=score), tmp_path / "run", progress=False)
    answers = {**settings["evaluate"], "answers": {"count": 3}}
    engine = {**settings["engine"], "max_length": 100}
    with pytest.raises(DataError, match=r"reference/b\.jsonl, line 2: the instruction leaves no room"):
        loop.run(make_config(settings, data=data, evaluate=answers, engine=engine), tmp_path / "run", progress=False)


def test_a_student_without_a_chat_template_is_found_before_the_first_stage(settings, tmp_path):
    given = {"student": without_template(settings["student"], tmp_path / "base")}
    with pytest.raises(DataError, match=r"warmup\.chat_template, .*base: the tokenizer has no chat template; set"):
        loop.run(make_config(settings, **given), tmp_path / "run", progress=False)
    for template in ("plain", "none"):
        changes = {name: {**settings.get(name, {}), "chat_template": template} for name in ("warmup", "score", "train")}
        check_config(make_config(settings, **given, **changes))


def test_evaluation_rows_in_the_reference_are_refused(settings, tmp_path):
    data = {**settings["data"], "evaluation": settings["data"]["reference"]}
    with pytest.raises(DataError, match=r"5 of 9 evaluation rows have an instruction of the reference"):
        loop.run(make_config(settings, data=data), tmp_path / "run", progress=False)


@pytest.mark.parametrize("kind", ["columns", "messages", "part"])
def test_the_same_rows_in_other_columns_are_told(kind, settings, tmp_path):
    rows = [json.loads(line) for line in Path(settings["data"]["reference"]).read_text().splitlines()][:5]
    if kind == "messages":
        rows = [
            {"messages": [{"role": "user", "content": f" {row['instruction'].upper()}"},
                          {"role": "assistant", "content": row["response"]}]}
            for row in rows
        ]  # fmt: skip
    elif kind == "columns":
        rows = [{**row, "id": number} for number, row in enumerate(rows)]
    # In one file, the rows after those of the reference are held out.
    data = {**settings["data"], "evaluation": str(tmp_path / "more.jsonl")}
    if kind == "part":
        rows, data = [*rows, *rows[:4]], {**settings["data"], "reference": str(tmp_path / "more.jsonl")}
    write_jsonl(tmp_path / "more.jsonl", rows)
    with pytest.raises(DataError, match=r"more\.jsonl, line \d: [45] of [45] evaluation rows have an instruction of"):
        loop.run(make_config(settings, data=data), tmp_path / "run", progress=False)
    allowed = make_config(settings, data=data, split={**settings["split"], "leakage": "allow"})
    assert loop.Material.read(allowed).evaluation


QUESTION = "What do all of the birds of this valley eat in winter"
SHORT = "Make it shorter, please"


def chats(*conversations):
    return [
        {
            "messages": [
                {"role": role, "content": text}
                for turn in turns
                for role, text in (("user", turn), ("assistant", "Yes"))
            ]
        }
        for turns in conversations
    ]


@pytest.mark.parametrize(
    ("reference", "evaluation", "seed", "refused"),
    [
        (["Hi", SHORT], [SHORT.upper()], "", "evaluation rows"),
        ([SHORT], ["Hi", SHORT], "", "evaluation rows"),
        (["Hi", QUESTION], ["Hello", QUESTION + " "], "", "evaluation rows"),
        (["Hi", SHORT], ["Hello", SHORT], "", None),
        (["Hi", QUESTION], ["Hello"], QUESTION, "seeds"),
        (["Hi"], ["Hello", QUESTION], QUESTION, "seeds"),
    ],
)
def test_later_turns_are_held_out_too(reference, evaluation, seed, refused, settings, tmp_path):
    rows = {"reference": chats(reference), "evaluation": chats(evaluation), "seeds": [{"instruction": seed or "Other"}]}
    for name, content in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", content)
    config = make_config(settings, data={name: str(tmp_path / f"{name}.jsonl") for name in rows})
    if refused:
        with pytest.raises(DataError, match=refused):
            loop.Material.read(config)
    else:
        # What the teacher writes is compared with all of them.
        assert loop.Material.read(config).held_out == [*reference, *evaluation]


def test_seeds_in_the_evaluation_set_are_refused(settings, tmp_path):
    data = {**settings["data"], "seeds": settings["data"]["reference"]}
    with pytest.raises(DataError, match=r"9 of 9 seeds are also in the reference or evaluation set"):
        loop.run(make_config(settings, data=data), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_reference_without_rows_left_to_evaluate_on(settings, tmp_path):
    data = {**settings["data"], "reference_rows": 9}
    with pytest.raises(DataError, match=r"9 rows and data\.reference_rows=9 leave none"):
        loop.run(make_config(settings, data=data), tmp_path, progress=False)
