"""A language model as judge: a grade for one answer, or a choice between two."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from montessori.errors import DataError
from montessori.journal import ScoreJournal
from montessori.loop import prompts
from montessori.loop.engines import Engine, EngineSettings, Request, SampleMemory, Sampling, derive_seed, open_engine
from montessori.loop.section import ChatSection

GRADE_REQUEST = (
    "Below are an instruction and an answer, which are to be used to train an assistant. Grade them together from 1 "
    "(useless: unclear, wrong or off the point) to 10 (a clear instruction with a correct and complete answer). Give "
    "the grade as a number and nothing else.\n\nInstruction:\n{instruction}\n\nAnswer:\n{response}\n\nGrade:"
)
CHOICE_REQUEST = (
    "Below are an instruction and two answers, A and B. Which answer follows the instruction better: is it more "
    "correct, more helpful, clearer? Do not prefer an answer for its place or its length. Reply with A, B or tie and "
    "nothing else.\n\nInstruction:\n{instruction}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nBetter answer:"
)
# Not one end of a range, nor the number of a line: "4-5", "3. 8".
_NUMBER = r"(10(?:\.0+)?|[1-9](?:\.\d+)?)(?!\.?\d|\w|\s*[-–.]\s*\d)"
_FIRST_GRADE = re.compile(r"^[\s*_#\"'(]*(?:(?:grade|score|rating)\b[\s*_:]*)?" + _NUMBER, re.IGNORECASE)
_GRADE = re.compile(r"(?<![\w.-])" + _NUMBER)
_SCALE = re.compile(r"\b1\s*(?:to|-|–)\s*10\b|(?:/|\bout of)\s*10\b")
_VERB = r"(?:is|was|wins|follows|gives|has|because|as|since)\b"
_NAME = r"(?:[Aa]nswer\W+|[Rr]esponse\W+)?(A|B|(?i:tie))\b"
# A verdict alone in the first line; in the last one, after what it is the verdict of or without.
_ALONE_FIRST = re.compile(rf"^\W*{_NAME}[^\w\n]*(?:\n|$)")
_ALONE_LAST = re.compile(rf"(?:^|\n)\W*(?:([\w '-]+)\W*:)?\W*{_NAME}\W*$")
_FIRST_CHOICE = re.compile(rf"^\W*{_NAME}\W+{_VERB}")
_NAMED_CHOICE = re.compile(
    r"(?:answer|better|prefer|choose|choice|verdict|winner)\b(?:\W+is)?\W+(A|B)\b", re.IGNORECASE
)
_TIE = re.compile(r"\btie\b(?!-)", re.IGNORECASE)
# With one of these a sentence may say which answer is the worse one.
_AGAINST = re.compile(
    r"n't\b|\b(?:not|no|never|neither|nor|cannot|without|less|least|worse|worst|weaker|poorer|wrong\w*|incorrect\w*|"
    r"inaccurate\w*|errors?|mistakes?|mistaken|flaws?|fails?|failed|lacks?|loses?|lost|missing|misses|missed|ignores?|"
    r"ignored|false|bad|poor|inferior|unhelpful)\b",
    re.IGNORECASE,
)
# An article is no verdict: the letter before a word in small letters is one.
_CHOICE = re.compile(r"\b(A(?! (?!and\b|or\b)[a-z])|B)\b")
_PREFERENCE = {"a": 1.0, "b": 0.0, "tie": 0.5}


def read_grade(reply: str) -> float:
    """The grade that a reply begins with, else its only one; NaN where it gives none or several."""
    reply = _SCALE.sub(" ", reply)
    first = _FIRST_GRADE.match(reply)
    found = {float(first[1])} if first else {float(grade) for grade in _GRADE.findall(reply)}
    return found.pop() if len(found) == 1 else np.nan


def read_choice(reply: str) -> float:
    """1 for A, 0 for B, 0.5 for a tie; NaN where the reply has no verdict or several, or says what is wrong."""
    first, last = _ALONE_FIRST.match(reply), _ALONE_LAST.search(reply)
    if first:
        return _PREFERENCE[first[1].lower()]
    if last and not _AGAINST.search(last[1] or ""):
        return _PREFERENCE[last[2].lower()]
    if _AGAINST.search(reply):
        return np.nan
    first = _FIRST_CHOICE.match(reply)
    if first:
        return _PREFERENCE[first[1].lower()]
    if _TIE.search(reply):
        return 0.5
    named = {choice.upper() for choice in _NAMED_CHOICE.findall(reply)}
    found = named if len(named) == 1 else set(_CHOICE.findall(reply))
    return _PREFERENCE[found.pop().lower()] if len(found) == 1 else np.nan


class JudgeSettings(ChatSection):
    """Who judges: `model` through `engine`; with the engine "endpoint", `model` gives the tokenizer alone.

    Of two answers each is shown first once. `seed`: of its sampling.
    """

    model: str
    engine: EngineSettings = EngineSettings()
    sampling: Sampling = Sampling(temperature=0, presence_penalty=0, max_new_tokens=16)
    seed: int = Field(default=0, ge=0)


@contextmanager
def open_judge(settings: JudgeSettings, folder: Path) -> Iterator[Judge]:
    """The judge, loaded for the length of the context."""
    engine = open_engine(settings.engine)
    engine.load(settings.model)
    try:
        yield Judge(settings, engine, folder)
    finally:
        engine.release()


@dataclass
class Judge:
    """A loaded judge; replies are kept in `folder` as they come, so that a killed run goes on.

    `unread` counts replies without a verdict in them, and answers too long to be judged; `tokens` what the judge wrote.
    """

    settings: JudgeSettings
    engine: Engine
    folder: Path
    tokens: int = 0
    unread: int = 0

    def grade(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Grades of the rows' instructions and responses, float64 [N] from 1 to 10, NaN where none was given.

        Raises DataError when the judge gave no grade at all.
        """
        contents = [GRADE_REQUEST.format(instruction=row["instruction"], response=row["response"]) for row in rows]
        grades = np.array([read_grade(reply) for reply in self._ask("grade", contents)])
        self._check(grades, "a grade from 1 to 10")
        return grades

    def prefer(
        self, instructions: Sequence[str], ours: Sequence[str], theirs: Sequence[str], name: str = "prefer"
    ) -> tuple[list[float], list[float]]:
        """Preference for our answer to each instruction, when it is shown first and when it is shown second.

        1 is a win, 0 a loss, 0.5 a tie or a reply without a verdict. `name` tells several comparisons in one
        folder apart. Raises DataError when no reply has one.
        """
        shown = [(ours, theirs), (theirs, ours)]
        contents = [
            CHOICE_REQUEST.format(instruction=instruction, first=first, second=second)
            for answers in shown
            for instruction, first, second in zip(instructions, *answers, strict=True)
        ]
        values = np.array([read_choice(reply) for reply in self._ask(name, contents)])
        self._check(values, "A, B or tie")
        values = np.where(np.isnan(values), 0.5, values)
        size = len(instructions)
        return values[:size].tolist(), (1 - values[size:]).tolist()

    def _ask(self, part: str, contents: Sequence[str]) -> list[str]:
        requests = [
            Request(
                f"{part}-{number:06d}",
                prompts.ask(self.engine.tokenizer, content, **self.settings.chat),
                derive_seed(self.settings.seed, part, number),
            )
            for number, content in enumerate(contents)
        ]
        journal = ScoreJournal(self.folder / f"judge.{part}.jsonl")
        with journal.opened({"judge": self.settings.model, "requests": str(derive_seed(*contents))}):
            fitting = [request for request in requests if self.engine.fits(request.prompt)]
            samples = SampleMemory(journal).complete(self.engine, fitting, self.settings.sampling)
        self.tokens += sum(sample.num_tokens for sample in samples)
        replies = {request.id: sample.text for request, sample in zip(fitting, samples, strict=True)}
        return [replies.get(request.id, "") for request in requests]

    def _check(self, values: np.ndarray, expected: str) -> None:
        self.unread += int(np.isnan(values).sum())
        if np.isnan(values).all():
            raise DataError(
                f"judge {self.settings.model}: expected {expected} in a reply, got none: use another judge, or, once "
                "this one is mended, begin the stage anew (--from), since its replies are kept"
            )
