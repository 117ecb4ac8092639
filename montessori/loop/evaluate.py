"""What a round achieved: held-out loss of the student, and real influence of what each teacher wrote."""

from __future__ import annotations

import os
import random
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from montessori.data import Rows, load_rows
from montessori.encoding import encode_rows
from montessori.estimator import InfluenceEstimator
from montessori.journal import ScoreJournal
from montessori.loop.answers import AnswerSettings, answer, read_mt_bench, write_alpaca_eval, write_mt_bench
from montessori.loop.engines import Engine
from montessori.loop.harness import check_tasks, harness
from montessori.loop.heldout import encode_heldout, row_losses
from montessori.loop.judge import JudgeSettings, open_judge
from montessori.loop.prompts import instruction_text
from montessori.loop.rows import length_limit, student_rows
from montessori.loop.section import Section
from montessori.loop.statistics import bootstrap_mean, compare_means
from montessori.loop.winrate import win_rate
from montessori.models import load_model
from montessori.options import resolve_device
from montessori.scores import OK
from montessori.writing import write_json

EVALUATION_FILE = "evaluation.json"
# Options of the estimator that decide how text becomes tokens.
TEXT_OPTIONS = ("max_length", "chat_template", "chat_template_kwargs")


class EvaluateSettings(Section):
    """What is measured after a round.

    `sample`: rows of each teacher whose influence is measured by real steps, 0 for none: new ones of the tuned
    teacher, of the untuned one some of the candidates; with `teacher_mode: untuned` there is no such step to take.
    `resamples`: of the bootstrap and of the permutation test. `answers`: to the evaluation prompts, for a
    win rate where there is a judge. `tasks`: of lm-evaluation-harness, by name or as
    YAML files, run on the student.
    """

    sample: int = Field(default=64, ge=0)
    resamples: int = Field(default=10_000, ge=100)
    answers: AnswerSettings = AnswerSettings()
    tasks: tuple[str, ...] = ()


def check(settings: EvaluateSettings) -> None:
    """Raise what an evaluation would stop at for want of a file or a library, before the hours that come first."""
    check_tasks(settings.tasks)
    if settings.answers.questions is not None:
        read_mt_bench(load_rows(settings.answers.questions, name="questions"))


def held_out(
    models: Mapping[str, str | os.PathLike[str]],
    evaluation: str | os.PathLike[str] | Rows,
    *,
    seed: int,
    resamples: int = 10_000,
    max_length: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    progress: bool = False,
    **chat: Any,
) -> dict[str, Any]:
    """Loss of each named model on the evaluation rows, and how far the first is below each other.

    Returns {"models": {name: {"loss": interval, "rows": losses}}, "below": {name: interval}}: losses are
    mean token losses in nats, weighted alike per row; intervals are by bootstrap over the rows. "below" is
    the loss of `name` minus that of the first model, row by row: positive says that the first is better.
    Finished batches are kept below `out`, so that a killed run goes on.
    """
    rows = load_rows(evaluation, name="evaluation")
    losses: dict[str, np.ndarray] = {}
    for name, source in models.items():
        model, tokenizer = load_model(source)
        model.to(resolve_device(device))
        examples = encode_heldout(rows, model, tokenizer, max_length=max_length, **chat)
        journal = None if out is None else ScoreJournal(out / _journal_of_losses(name))
        losses[name] = row_losses(model, examples, journal=journal, progress=progress)
    options = {"seed": seed, "resamples": resamples}
    first, *others = losses
    return {
        "models": {
            name: {"loss": bootstrap_mean(values, **options).to_dict(), "rows": values.tolist()}
            for name, values in losses.items()
        },
        "below": {name: bootstrap_mean(losses[name] - losses[first], **options).to_dict() for name in others},
    }


def sample_rows(
    rows: Sequence[Mapping[str, Any]], count: int, seed: int, usable: Container[int] | None = None
) -> list[int]:
    """Row numbers of a random sample of the `usable` rows, by default of all, in file order; a second row of one
    prompt only when prompts run out.

    Siblings share their prompt, so a sample of distinct prompts is closer to independent.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    order = [index for index in order if usable is None or index in usable]
    seen: set[str] = set()
    first: list[int] = []
    later: list[int] = []
    for index in order:
        prompt = rows[index].get("prompt_id", str(index))
        (later if prompt in seen else first).append(index)
        seen.add(prompt)
    return sorted((first + later)[:count])


def fresh_influence(
    student: str | os.PathLike[str],
    reference: Any,
    files: Mapping[str, Path],
    out: Path,
    *,
    sample: int,
    seed: int,
    resamples: int = 10_000,
    device: str = "auto",
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Real influence (method "exact") of a sample of each file of generated rows on the warmed-up `student`.

    `student`: a checkpoint with its optimizer state. `files`: "tuned" and "untuned", rows of each teacher, of which
    those are drawn from that have a token to learn.
    `options`: as in InfluenceEstimator (max_length, chat_template, max_grad_norm, …). Finished steps are
    kept below `out`, so that a killed run goes on.

    Returns {"tuned": {"mean": interval, "rows": numbers, "influence": values, "drift": mean}, "untuned": …,
    "comparison": {"difference": interval, "p": one-sided}}, influence in nats per token; "mean" is None where no row
    has a value, and then there is no comparison.
    """
    model, tokenizer = load_model(student)
    model.to(resolve_device(device))
    options = {"truncation": "right", **options}
    text = {key: options[key] for key in (*TEXT_OPTIONS, "truncation") if key in options}
    text["max_length"] = length_limit(model, options.get("max_length"), "score")
    estimator = InfluenceEstimator(model, student, reference, method="exact", tokenizer=tokenizer, **options)
    result: dict[str, Any] = {}
    values: dict[str, np.ndarray] = {}
    for name, file in files.items():
        rows = student_rows(file)
        usable = {example.index for example in encode_rows(rows, tokenizer, **text).examples}
        chosen = sample_rows(load_rows(file), sample, seed, usable)
        result[name] = {"mean": None, "rows": chosen, "influence": [], "drift": None}
        if not chosen:
            continue
        journal = ScoreJournal(out / _journal_of_steps(name))
        scores = estimator.score([rows[index] for index in chosen], progress=progress, journal=journal)
        influence = scores.influence.reshape(len(scores), -1).mean(axis=1)
        found = influence[scores.status == OK]
        result[name] |= {
            "influence": [float(value) if np.isfinite(value) else None for value in influence],
            "drift": float(np.mean(scores.drift)),
        }
        if len(found):
            values[name] = found
            result[name]["mean"] = bootstrap_mean(found, seed=seed, resamples=resamples).to_dict()
    if {"tuned", "untuned"} <= values.keys():
        compared = compare_means(values["tuned"], values["untuned"], seed=seed, resamples=resamples)
        result["comparison"] = compared.to_dict()
    return result


def win_rates(
    settings: AnswerSettings,
    judge: JudgeSettings | None,
    engine: Engine,
    students: Mapping[str, str | os.PathLike[str]],
    instructions: Sequence[str],
    out: Path,
    seed: int,
    resamples: int = 10_000,
) -> dict[str, Any]:
    """Answers of all `students` in AlpacaEval's format and, with a judge, the win rate of the first over each other.

    Returns {name of the other: its WinRate as a dict, with "unread", the verdicts that the judge did not give}.
    """
    chosen = list(instructions[: settings.count])
    answers = {
        name: [turns[0] for turns in answer(settings, engine, model, [[text] for text in chosen], out, name, seed)]
        for name, model in students.items()
    }
    for name, texts in answers.items():
        write_alpaca_eval(out / f"alpaca_eval_{name}.json", chosen, texts, name)
    if judge is None:
        return {}
    (_, ours), *others = answers.items()
    found: dict[str, Any] = {}
    for name, theirs in others:
        with open_judge(judge, out) as judging:
            preferences = judging.prefer(chosen, ours, theirs, f"against_{name}")
            lengths = list(map(len, ours)), list(map(len, theirs))
            rate = win_rate(*preferences, *lengths, seed=seed, resamples=resamples)
            found[name] = {**rate.to_dict(), "unread": judging.unread}
    return found


def run(
    settings: EvaluateSettings,
    *,
    student: str | os.PathLike[str],
    base: str | os.PathLike[str],
    warm_student: str | os.PathLike[str],
    evaluation: Rows,
    reference: Any,
    files: Mapping[str, Path],
    out: Path,
    seed: int,
    engine: Engine | None = None,
    judge: JudgeSettings | None = None,
    device: str = "auto",
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Measure the trained `student` against its `base`, and the instructions in `files`; write evaluation.json.

    `warm_student`: checkpoint with optimizer state at which influence is measured. `files`: as in
    `fresh_influence`. `engine` writes answers where `settings.answers` asks for them, `judge` compares them.
    `device`: of losses and influence. `options`: as in InfluenceEstimator.
    """
    text = {key: options[key] for key in TEXT_OPTIONS if key in options}
    repeat: dict[str, Any] = {"seed": seed, "resamples": settings.resamples}
    where: dict[str, Any] = {"out": out, "device": device, "progress": progress}
    models = {"student": student, "base": base}
    found = held_out(models, evaluation, **where, **repeat, **text)
    content: dict[str, Any] = {"held_out": found}
    if settings.sample:
        content["influence"] = fresh_influence(
            warm_student, reference, files, sample=settings.sample, **where, **repeat, **options
        )
    if settings.answers.count and engine is not None:
        others = {"opponent" if settings.answers.opponent else "base": settings.answers.opponent or base}
        asked, students = instruction_text(evaluation), {"student": student, **others}
        content["win_rate"] = win_rates(settings.answers, judge, engine, students, asked, out, **repeat)
    if settings.answers.questions is not None and engine is not None:
        questions = load_rows(settings.answers.questions, name="questions")
        answers = answer(settings.answers, engine, student, read_mt_bench(questions), out, "mt_bench", seed)
        write_mt_bench(out / "mt_bench_student.jsonl", questions, answers, "student")
    if settings.tasks:
        content["harness"] = harness(student, settings.tasks)
    write_json(out / EVALUATION_FILE, content)
    for journal in [*map(_journal_of_losses, models), *map(_journal_of_steps, files)]:
        ScoreJournal(out / journal).remove()
    return content


def _journal_of_losses(name: str) -> str:
    return f"held_out_{name}.journal.jsonl"


def _journal_of_steps(name: str) -> str:
    return f"{name}.journal.jsonl"
