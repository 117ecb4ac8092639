"""What a round achieved: held-out loss, real influence, answers and the files that benchmarks read."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from loop_support import make_generated
from support import make_text_rows, plain_loss, slow_influence

from montessori.checkpoints import read_state
from montessori.data import Rows
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError, StateError
from montessori.loop import evaluate, heldout, winrate
from montessori.loop.answers import AnswerSettings, answer, read_mt_bench, write_mt_bench
from montessori.loop.config import read_config
from montessori.loop.engines import EngineSettings, Sampling, open_engine, tokens_written
from montessori.loop.evaluate import EvaluateSettings
from montessori.loop.harness import check_tasks, harness
from montessori.loop.judge import JudgeSettings
from montessori.loop.round import run as run_loop
from montessori.loop.rows import student_rows
from montessori.loop.statistics import bootstrap_mean
from montessori.models import load_model
from montessori.naive import make_adamw
from montessori.passes import example_losses
from montessori.writing import write_jsonl

EVALUATION = Rows(make_text_rows(5, seed=11), "evaluation")
REFERENCE = make_text_rows(3, seed=9)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    for name, seed in (("tuned", 1), ("untuned", 2)):
        write_jsonl(folder / f"{name}.jsonl", make_generated(4, seed=seed))
    return {name: folder / f"{name}.jsonl" for name in ("tuned", "untuned")}


def token_rows(rows, tokenizer):
    examples = encode_rows(rows, tokenizer, max_length=64).examples
    return [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]


def test_held_out_loss_is_the_mean_of_the_rows_own_losses(student, tmp_path):
    model, tokenizer = load_model(student)
    expected = [float(plain_loss(model, row).detach()) for row in token_rows(EVALUATION, tokenizer)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    found = evaluate.held_out({"student": student, "half": tmp_path / "half"}, EVALUATION, seed=0)
    np.testing.assert_allclose(found["models"]["student"]["rows"], expected, rtol=1e-5)
    assert found["models"]["student"]["loss"]["mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    difference = np.mean(found["models"]["half"]["rows"]) - np.mean(expected)
    assert found["below"]["half"]["mean"] == pytest.approx(difference, abs=1e-5)


def test_fresh_influence_is_that_of_real_steps_on_the_sampled_rows(student, files, tmp_path):
    found = evaluate.fresh_influence(student, REFERENCE, files, tmp_path, sample=3, seed=0, progress=False)
    model, tokenizer = load_model(student)
    optimizer = make_adamw(model, read_state(student, model))
    for name, file in files.items():
        candidates = token_rows([student_rows(file)[index] for index in found[name]["rows"]], tokenizer)
        expected = slow_influence(model, optimizer, candidates, token_rows(REFERENCE, tokenizer), "exact")
        # Differences of float32 losses near 4: about 4 × 2^-24 each.
        np.testing.assert_allclose(found[name]["influence"], expected, atol=2e-6)
        assert found[name]["mean"]["mean"] == pytest.approx(np.mean(expected), abs=2e-6)
    difference = found["tuned"]["mean"]["mean"] - found["untuned"]["mean"]["mean"]
    assert found["comparison"]["difference"]["mean"] == pytest.approx(difference)
    json.dumps(found)
    assert 0 < found["comparison"]["p"] <= 1


def test_rows_without_a_token_to_learn_are_not_drawn(student, files, tmp_path):
    """Cut at so many tokens, some rows have no answer left."""
    usable, cut = {"tuned": (), "untuned": (0, 5, 9)}, {}
    for name, file in files.items():
        rows = list(student_rows(file))
        for index in set(range(len(rows))).difference(usable[name]):
            rows[index]["instruction"] = " ".join([rows[index]["instruction"]] * 30)
        cut[name] = tmp_path / f"{name}.jsonl"
        write_jsonl(cut[name], rows)
    options = {"sample": 4, "seed": 0, "progress": False, "max_length": 24}
    found = evaluate.fresh_influence(student, REFERENCE, cut, tmp_path, **options)
    assert found["untuned"]["rows"] == [0, 5, 9] and found["untuned"]["mean"]["n"] == 3
    assert found["tuned"] == {"mean": None, "rows": [], "influence": [], "drift": None}
    assert "comparison" not in found


def test_a_sample_takes_one_row_of_every_prompt_first_and_repeats():
    rows = make_generated(6)
    chosen = evaluate.sample_rows(rows, 6, seed=3)
    assert len({rows[index]["prompt_id"] for index in chosen}) == 6
    assert chosen == evaluate.sample_rows(rows, 6, seed=3) != evaluate.sample_rows(rows, 6, seed=4)
    assert len(set(evaluate.sample_rows(rows, 15, seed=3))) == 15
    assert evaluate.sample_rows(rows, 99, seed=3) == list(range(24))


def measure(student, files, out, **settings):
    return evaluate.run(
        EvaluateSettings(resamples=200, **settings),
        student=student, base=student, warm_student=student, evaluation=EVALUATION, reference=REFERENCE,
        files=files, out=out, seed=0, engine=open_engine(EngineSettings(batch_size=4, device="cpu")),
        judge=settings.pop("judge", None), progress=False,
    )  # fmt: skip


def test_an_evaluation_repeats_and_leaves_no_journal_of_steps(student, files, tmp_path):
    settings = {"sample": 2, "answers": AnswerSettings(count=2, sampling=Sampling(max_new_tokens=4))}
    found = measure(student, files, tmp_path / "one", **settings)
    measure(student, files, tmp_path / "two", **settings)
    one, two = ((tmp_path / name / "evaluation.json").read_bytes() for name in ("one", "two"))
    assert one == two and json.loads(one) == json.loads(json.dumps(found))
    assert not list((tmp_path / "one").glob("*.journal*"))
    rows = json.loads((tmp_path / "one" / "alpaca_eval_student.json").read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in EVALUATION[:2]]
    assert all(row.keys() == {"dataset", "instruction", "output", "generator"} for row in rows)
    assert rows[0]["generator"] == "student"


def test_a_killed_evaluation_goes_on_with_the_losses_it_lacks(student, files, tmp_path, monkeypatch):
    expected = measure(student, files, tmp_path / "unbroken", sample=1)
    calls = []

    def counted(*arguments, stop_after=None):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return example_losses(*arguments)

    monkeypatch.setattr(heldout, "make_batches", lambda examples, _: [[example] for example in examples])
    monkeypatch.setattr(heldout, "example_losses", partial(counted, stop_after=7))
    with pytest.raises(KeyboardInterrupt):
        measure(student, files, tmp_path / "killed", sample=1)
    monkeypatch.setattr(heldout, "example_losses", counted)
    found = measure(student, files, tmp_path / "killed", sample=1)
    # Student and base, each row once.
    assert len(calls) == 2 * len(EVALUATION)
    for name, losses in expected["held_out"]["models"].items():
        np.testing.assert_allclose(found["held_out"]["models"][name]["rows"], losses["rows"], rtol=1e-6)


def test_losses_of_another_model_are_not_taken_over(student, tmp_path):
    evaluate.held_out({"student": student}, EVALUATION, seed=0, out=tmp_path)
    model, tokenizer = load_model(student)
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(StateError, match="holds an unfinished run with other model"):
        evaluate.held_out({"student": tmp_path / "other"}, EVALUATION, seed=0, out=tmp_path)


class Judge:
    """A server that answers every request with `verdict`."""

    def __init__(self, verdict: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                body = {"choices": [{"text": verdict, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_judge_behind_an_endpoint_gives_a_win_rate_over_the_base(student, tmp_path, monkeypatch):
    settings = AnswerSettings(count=3, sampling=Sampling(max_new_tokens=4))
    engine = open_engine(EngineSettings(batch_size=4, device="cpu"))
    with Judge(" A") as url:
        judge = JudgeSettings(model=str(student), engine=EngineSettings(name="endpoint", base_url=url, model="judge"))
        students = {"student": student, "base": student}
        asked, seen = ["what is red", "add two", "say hello"], []

        def watched(values, **options):
            seen.append(options)
            return bootstrap_mean(values, **options)

        monkeypatch.setattr(winrate, "bootstrap_mean", watched)
        found = evaluate.win_rates(settings, judge, engine, students, asked, tmp_path, seed=0, resamples=123)
    assert seen == [{"seed": 0, "resamples": 123}]
    # Three answers of at most four tokens of each student, and six verdicts of one.
    assert 6 + 6 <= tokens_written(tmp_path.glob("[aj]*.jsonl")) <= 6 + 24
    # It always takes the answer shown first, which both orders cancel.
    assert found["base"]["win_rate"]["mean"] == 0.5 and found["base"]["first_position"] == 1.0
    assert found["base"]["unread"] == 0


def test_mt_bench_questions_are_answered_turn_by_turn(student, tmp_path):
    questions = Rows(
        [
            {"question_id": 81, "category": "writing", "turns": ["what is red", "and blue"]},
            {"question_id": 82, "category": "maths", "turns": ["add two and three"]},
        ],
        "question.jsonl",
    )
    settings = AnswerSettings(sampling=Sampling(max_new_tokens=5, temperature=0, presence_penalty=0))
    engine = open_engine(EngineSettings(batch_size=4, device="cpu"))
    answers = answer(settings, engine, student, read_mt_bench(questions), tmp_path, "mt_bench", seed=0)
    assert list(map(len, answers)) == [2, 1]
    # The second answer is the greedy one to the whole conversation.
    model, tokenizer = load_model(student)
    messages = [
        {"role": "user", "content": "what is red"},
        {"role": "assistant", "content": answers[0][0]},
        {"role": "user", "content": "and blue"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).split() == answers[0][1].split()
    write_mt_bench(tmp_path / "model.jsonl", questions, answers, "model")
    rows = [json.loads(line) for line in (tmp_path / "model.jsonl").read_text().splitlines()]
    assert rows[0]["choices"] == [{"index": 0, "turns": answers[0]}] and rows[1]["question_id"] == 82
    assert len({row["answer_id"] for row in rows}) == 2
    # A second call answers from disk, without a model.
    assert answer(settings, engine, student, read_mt_bench(questions), tmp_path, "mt_bench", seed=0) == answers


def test_answers_drawn_by_chance_follow_the_seed_of_the_run(student, tmp_path):
    settings = AnswerSettings(sampling=Sampling(max_new_tokens=12, temperature=1.5, presence_penalty=0))
    engine = open_engine(EngineSettings(batch_size=4, device="cpu"))
    asked = [["what is red"], ["add two and three"]]
    found = [answer(settings, engine, student, asked, tmp_path / str(n), "x", seed=n // 2) for n in range(4)]
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]


def test_questions_without_turns_name_the_line():
    with pytest.raises(DataError, match=r"question\.jsonl, line 1: expected question_id and turns"):
        read_mt_bench(Rows([{"question_id": 1, "turns": []}], "question.jsonl", "line", 1))


HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(HARNESS, reason="lm-evaluation-harness is installed")
def test_the_harness_names_its_package_when_it_is_not_installed(student):
    with pytest.raises(ArgumentError, match=r"pip install lm-eval"):
        harness(student, ["arc_easy"])


@pytest.mark.skipif(not HARNESS, reason="needs lm-evaluation-harness")
def test_the_harness_runs_a_task_from_a_file_on_this_machine(student, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "a b", "answer": "c"}, {"question": "b c", "answer": "d"}])
    task = {
        "task": "of_my_own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["c", "d"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    found = harness(student, [str(tmp_path / "task.yaml")])
    assert found["of_my_own"]["acc,none"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("- a list", "with a key 'task'"), ("{task: [1}", "expected YAML")],
)
def test_a_task_file_that_cannot_be_used_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    file = tmp_path / "task.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ArgumentError, match=f"task.yaml: .*{words}"):
        check_tasks([str(file)])


def test_what_an_evaluation_lacks_is_said_before_the_round(tmp_path):
    missing = tmp_path / "question.jsonl"
    config = read_config(preset="demo", assignments=[f"evaluate.answers.questions={missing}"])
    with pytest.raises(DataError, match=r"question\.jsonl"):
        run_loop(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
