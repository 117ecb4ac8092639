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
# Not one end of a range, of another scale or of a choice, nor the number of a line: "4-5", "4/5", "4 or 5", "3. 8".
_NUMBER = r"(10(?:\.0+)?|[1-9](?:\.\d+)?)(?!\.?\d|\w|\s*[-–.]\s*\d|\s*(?:[/%~→½]|or\b|to\b|out of\b)|,\d)"
_SCALE = re.compile(r"\b1\s*(?:to|and|-|–)\s*10\b|(?:/|\bout of)\s*10(?:\.0+)?\b")
_OF_TWO = re.compile(r"\d\s*(?:[/~→½–-]|or|to|out of)\s*\d|\d½")
_LABELLED_GRADE = re.compile(r"\b(?:grade|score|rating)\b(?:[\s*_:=()\[\]\"'>]|-\s)*" + _NUMBER, re.IGNORECASE)
# Not how many of something there are: "2 of the 3 steps", "3 reasons why".
_FIRST_GRADE = re.compile(
    r"^[\s*_#\"'(\[]*" + _NUMBER + r"(?![ \t]+(?!(?:of 10|because|since|as|for|points?)\b)[a-z]|\)\s*[a-z])",
    re.IGNORECASE,
)
_GRADE = re.compile(r"(?<![\w.-])(?<!\d,)" + _NUMBER)
_ENDS = re.compile(r"\W*(?:$|[.!\n])")

_BEFORE = r"(?:(?i:answer|response|option|assistant)\W+)?"
_NAME, _VERDICT = rf"{_BEFORE}(A|B)\b", rf"{_BEFORE}(A|B|(?i:tie))\b"
_OTHER = rf"{_BEFORE}(?:A|B)"
# A verdict alone in the first line; in the last one, after what it is the verdict of or without.
_ALONE_FIRST = re.compile(rf"^\W*{_VERDICT}[^\w\n?]*(?:\n|$)")
_ALONE_LAST = re.compile(rf"(?:^|\n)\W*(?:([\w '-]+)\W*:)?\W*{_VERDICT}[^\w?]*$")
# With one of these a sentence may say which answer is the worse one.
_AGAINST = re.compile(
    r"n't\b|\b(?:not|no|never|neither|nor|cannot|hardly|barely|without|less|least|worse|worst|weak\w*|poorer|wrong\w*|"
    r"incorrect\w*|inaccurate\w*|errors?|mistakes?|mistaken|flaws?|fails?|failed|lacks?|los(?:es?|er|ing)|lost|missing|"
    r"misses|missed|ignores?|ignored|false|bad|poor|inferior|unhelpful)\b",
    re.IGNORECASE,
)
_BETTER = (
    r"(?i:better|clearer|stronger|superior|preferable|more\s+(?:accurate|complete|correct|detailed|direct|helpful|"
    r"informative|precise|relevant|thorough|useful))"
)
_ON = r"(?:(?!\b[AB]\b)[^.;:?\n])*?"  # within a sentence, up to the next letter
_SENTENCES = [
    # Which answer is better than the other, or is taken before it.
    re.compile(rf"\b(A|B)\b{_ON}\b{_BETTER}\b{_ON}\b(?i:than|to)\b{_ON}\b(?:A|B)\b"),
    re.compile(rf"\b(A|B)\s+(?i:over|rather than|instead of|beats|outperforms|surpasses)\s+{_OTHER}\b"),
    re.compile(rf"\b(?i:choose|prefer|pick|select|favou?r|vote for|go with)\s+[*\"'(\[]*{_NAME}"),
    # What is said to be it.
    re.compile(
        r"\b(?i:better|best|preferred|winning|winner|verdict|choice)(?:\s+(?i:answer|response|one|choice|option))?"
        rf"[\s*_]*(?:[:=]|\b(?i:is|would be)\b)[\s*_\"'(\[]*{_NAME}"
    ),
    re.compile(rf"^\W*{_NAME}\W+(?i:because|since|as(?!\s+\w+\s+as\b))\b"),
    re.compile(r"\b(A|B)\s*>+\s*(?:A|B)\b"),
]
_ANY_LETTER = re.compile(r"\b[AB]\b")
# Not an article: it stands before a verb, before a word that joins it to another, or before no word at all.
_LETTER = re.compile(r"\b(A(?!\s+(?!(?:and|or|is|was|wins)\b)[a-z])|B)\b")
# One letter is a verdict where it is said to be so, or is the last of few words: "Option B".
_SAYS_SO = re.compile(rf"\b(?:{_BETTER}|(?i:best|wins))\b|^\W*(?:\w+\W+){{0,3}}[AB]\W*$")
_TIE = re.compile(r"\b(?:tie|tied)\b(?!-)", re.IGNORECASE)
_PREFERENCE = {"a": 1.0, "b": 0.0, "tie": 0.5}


def read_grade(reply: str) -> float:
    """The grade that a reply names as such, that it begins with, or that is its only number and ends a sentence; NaN
    where it gives none, several, or one of another scale than 1 to 10."""
    reply = _SCALE.sub(" ", reply)
    named = {float(grade) for grade in _LABELLED_GRADE.findall(reply)}
    if named:
        return named.pop() if len(named) == 1 else np.nan
    if first := _FIRST_GRADE.match(reply):
        return float(first[1])
    found = list(_GRADE.finditer(reply))
    ends = len(found) == 1 and _ENDS.match(reply, found[0].end())
    return float(found[0][1]) if ends and not (_OF_TWO.search(reply) or _AGAINST.search(reply)) else np.nan


def read_choice(reply: str) -> float:
    """1 for A, 0 for B, 0.5 for a tie; NaN where the reply has no verdict or several, or says what is wrong."""
    first, last = _ALONE_FIRST.match(reply), _ALONE_LAST.search(reply)
    if last and _AGAINST.search(last[1] or ""):
        last = None
    alone = {found.lower() for found in ((first and first[1]), (last and last[2])) if found}
    if alone:
        return _PREFERENCE[alone.pop()] if len(alone) == 1 else np.nan
    if _AGAINST.search(reply):
        return np.nan
    chosen = {found for sentence in _SENTENCES for found in sentence.findall(reply)}
    if chosen:
        return _PREFERENCE[chosen.pop().lower()] if len(chosen) == 1 else np.nan
    if _TIE.search(reply):
        # "A tie, leaning B" is none.
        return 0.5 if len(set(_LETTER.findall(reply))) != 1 else np.nan
    letters = set(_ANY_LETTER.findall(reply))
    told = len(letters) == 1 and _LETTER.search(reply) and _SAYS_SO.search(reply) and "?" not in reply
    return _PREFERENCE[letters.pop().lower()] if told else np.nan


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
        # What it thought before is no verdict.
        replies = {
            request.id: prompts.outside_thoughts(prompts.opening_thought(request.prompt) + sample.text)
            for request, sample in zip(fitting, samples, strict=True)
        }
        return [replies.get(request.id, "") for request in requests]

    def _check(self, values: np.ndarray, expected: str) -> None:
        self.unread += int(np.isnan(values).sum())
        if np.isnan(values).all():
            raise DataError(
                f"judge {self.settings.model}: expected {expected} in a reply, got none: use another judge, or, once "
                "this one is mended, begin the stage anew (--from), since its replies are kept"
            )
