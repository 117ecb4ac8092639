"""Answers of students to a set of questions, kept as they come, and the files that benchmarks read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from montessori.data import Rows
from montessori.errors import DataError
from montessori.journal import ScoreJournal
from montessori.loop import prompts
from montessori.loop.engines import Engine, Request, SampleMemory, Sampling, derive_seed
from montessori.loop.section import ChatSection
from montessori.writing import write_json, write_jsonl


class AnswerSettings(ChatSection):
    """How students answer: `count` of the evaluation prompts, 0 for none.

    `opponent`: the checkpoint whose answers compete in the win rate, by default the student's base.
    `questions`: questions of MT-Bench (question.jsonl) that the student answers as well, turn by turn.
    """

    count: int = Field(default=0, ge=0)
    opponent: str | None = None
    questions: str | None = None
    sampling: Sampling = Sampling(temperature=0, presence_penalty=0)


def answer(
    settings: AnswerSettings,
    engine: Engine,
    model: str | os.PathLike[str],
    questions: Sequence[Sequence[str]],
    folder: Path,
    name: str,
    seed: int,
) -> list[list[str]]:
    """Answers of `model` to `questions`, each the user's turns of one conversation; as many answers as turns.

    Kept in `folder`/answers.`name`.jsonl as they come, so that a killed run goes on.
    """
    engine.load(model)
    journal = ScoreJournal(folder / f"answers.{name}.jsonl")
    asked = str(derive_seed(*(turn for turns in questions for turn in turns)))
    with journal.opened({"questions": asked, "seed": seed}):
        memory = SampleMemory(journal)
        answers: list[list[str]] = [[] for _ in questions]
        for turn in range(max(map(len, questions), default=0)):
            open_ones = [index for index, turns in enumerate(questions) if turn < len(turns)]
            requests = [
                Request(
                    f"{index}-{turn}",
                    prompts.converse(
                        engine.tokenizer,
                        _messages(questions[index][: turn + 1], answers[index]),
                        **settings.chat,
                    ),
                    derive_seed(seed, name, index, turn),
                )
                for index in open_ones
            ]
            samples = memory.complete(engine, requests, settings.sampling)
            for index, sample in zip(open_ones, samples, strict=True):
                answers[index].append(sample.text)
    engine.release()
    return answers


def write_alpaca_eval(path: Path, instructions: Sequence[str], answers: Sequence[str], generator: str) -> None:
    """Model outputs as alpaca_eval reads them: a list of instruction, output, generator, dataset."""
    rows = [
        {"dataset": "evaluation", "instruction": instruction, "output": output, "generator": generator}
        for instruction, output in zip(instructions, answers, strict=True)
    ]
    write_json(path, rows)


def read_mt_bench(rows: Rows) -> list[list[str]]:
    """The turns of every question. Raises DataError, naming file and line."""
    for index, row in enumerate(rows):
        turns = row.get("turns")
        if "question_id" not in row or not isinstance(turns, list) or not turns or not all(map(_is_text, turns)):
            raise DataError(f"{rows.where(index)}: expected question_id and turns, a list of texts")
    return [list(row["turns"]) for row in rows]


def write_mt_bench(
    path: Path, questions: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], model_id: str
) -> None:
    """Model answers as FastChat's judge reads them (data/mt_bench/model_answer/MODEL.jsonl)."""
    rows = [
        {
            "question_id": question["question_id"],
            "answer_id": hashlib.sha256(f"{model_id}|{question['question_id']}".encode()).hexdigest()[:22],
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(turns)}],
            # The field is required; a real time would make every run's file another.
            "tstamp": 0.0,
        }
        for question, turns in zip(questions, answers, strict=True)
    ]
    write_jsonl(path, rows)


def _messages(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": turns[0]}]
    for answered, asked in zip(answers, turns[1:], strict=True):
        messages += [{"role": "assistant", "content": answered}, {"role": "user", "content": asked}]
    return messages


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
