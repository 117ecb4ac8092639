"""Which instructions are kept, and why the others are not."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from pydantic import Field, model_validator
from rapidfuzz import process
from rapidfuzz.distance import Indel
from typing_extensions import Self

from montessori.errors import ResourceError
from montessori.loop.section import Section

# What a model of text cannot see, hear, open or do.
BLOCKED_WORDS = (
    "image", "images", "picture", "pictures", "photo", "photos", "photograph", "screenshot", "graph", "graphs",
    "chart", "charts", "diagram", "diagrams", "flowchart", "map", "maps", "draw", "plot", "sketch", "paint",
    "video", "videos", "audio", "recording", "podcast", "file", "files", "attachment", "attached", "website",
    "link", "url", "click", "download", "upload", "go to", "watch", "listen",
)  # fmt: skip

# Scripts that put no blanks between words: Thai, Lao, Khmer, Burmese, kana, Han. Each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# A distinct word gets a code point of its own; which one does not matter.
_FIRST_CODE, _LAST_CODE = 0x10000, 0x10FFFF


class FilterSettings(Section):
    """Which instructions are kept.

    `min_characters`, `max_characters`: of the instruction. `blocked_words`: words that it may not have, such as those
    for what a model of text cannot do. `no_leading_punctuation`, `no_leading_non_ascii`: of its first character.
    `rouge`: highest ROUGE-L F measure against anything kept so far and the examples of the own prompt; against the
    reference and evaluation set it is at most 0.7.
    """

    min_characters: int = Field(default=6, ge=1)
    max_characters: int = Field(default=400, ge=1)
    blocked_words: tuple[str, ...] = BLOCKED_WORDS
    no_leading_punctuation: bool = True
    no_leading_non_ascii: bool = True
    rouge: float = Field(default=0.7, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(word.strip() for word in self.blocked_words):
            raise ValueError("blocked_words: expected words, got an empty one")
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters={self.min_characters}: expected at most max_characters={self.max_characters}"
            )
        return self

    @cached_property
    def _blocked(self) -> re.Pattern[str] | None:
        words = "|".join(map(_whole_word, self.blocked_words))
        return re.compile(words, re.IGNORECASE) if words else None

    def rejection(self, instruction: str | None) -> str | None:
        """Why `instruction` cannot be used, whatever else was written: a name for the counts; None if it can."""
        if instruction is None:
            return "marks_missing"
        if not instruction:
            return "empty"
        if len(instruction) < self.min_characters:
            return "too_short"
        if len(instruction) > self.max_characters:
            return "too_long"
        if self._blocked is not None and self._blocked.search(instruction):
            return "blocked_word"
        if self.no_leading_non_ascii and not instruction[0].isascii():
            return "leading_non_ascii"
        if self.no_leading_punctuation and unicodedata.category(instruction[0])[0] in "PS":
            return "leading_punctuation"
        return None


def _whole_word(word: str) -> str:
    """A pattern for `word` that no letter or digit goes on with, where it begins or ends with one itself ("c++" does
    not) and its script puts blanks between words; any blanks stand for its own."""
    parts = word.split()
    inner = r"\s+".join(map(re.escape, parts))
    before, behind = (_is_spaced(parts[place][place]) for place in (0, -1))
    return (r"\b" if before else "") + inner + (r"\b" if behind else "")


def _is_spaced(character: str) -> bool:
    return bool(re.match(rf"[^\W{_UNSPACED}]", character))


class RougeIndex:
    """Texts that a new one must differ from.

    ROUGE-L F of two texts of m and n words is 2·LCS/(m + n), which is the normalised Indel similarity of
    the word sequences. Words are runs of letters and digits, without regard to case or to how Unicode composes them,
    and single characters in scripts without blanks. Each distinct word becomes one character, so that a whole text is
    compared as one short string.
    """

    def __init__(self, threshold: float, texts: Iterable[str] = ()) -> None:
        self.threshold = threshold
        self._codes: dict[str, str] = {}
        self._texts: list[str] = []
        # Of each word, the texts that hold it.
        self._holding: dict[str, list[str]] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        encoded = self._encode(text)
        self._texts.append(encoded)
        for word in set(encoded):
            self._holding.setdefault(word, []).append(encoded)

    def is_close(self, text: str, others: Sequence[str] = ()) -> bool:
        """Whether the ROUGE-L F of `text` with any text of the index or of `others` is above the threshold."""
        query = self._encode(text)
        near = [self._encode(other) for other in others]
        return any(self._best(query, texts) > self.threshold + 1e-9 for texts in (near, self._sharing(query)))

    def _sharing(self, query: str) -> Collection[str]:
        """The texts of the index but such as share too few words with `query` to be close.

        2·LCS/(m + n) > t and n ≥ LCS give LCS > t·m/(2 − t). A text that has so many of the m words in common holds one
        of any m + 1 − so many, and of the rarest of them few texts hold one.
        """
        # Less a rounding error; a text without a word is close to nothing else.
        common = max(1, math.floor(self.threshold * len(query) / (2 - self.threshold) - 1e-6) + 1)
        holding = sorted((self._holding.get(word, []) for word in query), key=len)[: len(query) + 1 - common]
        return set().union(*holding) if query and sum(map(len, holding)) < len(self._texts) else self._texts

    def _best(self, query: str, texts: Collection[str]) -> float:
        found = process.extractOne(
            query, texts, scorer=Indel.normalized_similarity, score_cutoff=self.threshold, processor=None
        )
        return 0.0 if found is None else found[1]

    def _encode(self, text: str) -> str:
        return "".join(self._code(word) for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()))

    def _code(self, word: str) -> str:
        code = self._codes.get(word)
        if code is None:
            number = _FIRST_CODE + len(self._codes)
            if number > _LAST_CODE:
                raise ResourceError(f"more than {len(self._codes)} distinct words: split the run into smaller ones")
            code = self._codes[word] = chr(number)
        return code
