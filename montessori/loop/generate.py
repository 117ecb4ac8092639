"""Instructions by the teacher, filters, responses, and the split into warm-up and probing set."""

from __future__ import annotations

import random
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tqdm.auto import tqdm

from montessori.errors import DataError
from montessori.journal import ScoreJournal
from montessori.loop import prompts
from montessori.loop.engines import Engine, Request, Sample, SampleMemory, Sampling, derive_seed
from montessori.loop.filters import FilterSettings, RougeIndex
from montessori.loop.section import ChatSection, Section
from montessori.writing import write_json, write_jsonl

SAMPLES_FILE = "samples.jsonl"
# Examples are drawn again this often where a prompt would not fit into the teacher's context.
_DRAWS = 16
COUNTS_FILE = "counts.json"
REJECTED_FILE = "rejected.jsonl"
_REJECTED_SHOWN = 5
# ROUGE-L F measure against what is held out, above which nothing is kept, however alike the kept may be.
LEAK = 0.7
# A mark that ends a sentence, with what closes behind it; or a paragraph that does not lead on. The dot after a number
# may be that of a list, so it ends none.
_SENTENCE_END = re.compile(r"""(?<!\d)[.!?]["'”’)\]]*(?=\s|$)|[。！？][”’」』）]*|[^\s:,;](?=\s*\n\s*\n)""")


class GenerateSettings(ChatSection):
    """How instructions are written and which are kept.

    `style`: "chat" asks an instruct teacher for a reason and one instruction between marks; "completion"
    lets any teacher go on with a list of marked examples. Of the examples of a prompt `own_examples` come
    from what was kept so far, once there are that many, the rest from the seeds. Prompts are sent in waves
    of `prompts_per_wave`; a wave sees what the waves before it kept. `max_prompts` bounds the tries, by
    default at eight times the prompts that would do if every sample were kept; after `patience` prompts
    without one marked instruction the run stops.
    """

    style: Literal["chat", "completion"] = "chat"
    seed_examples: int = Field(default=6, ge=1)
    own_examples: int = Field(default=2, ge=0)
    samples_per_prompt: int = Field(default=4, ge=1)
    prompts_per_wave: int = Field(default=64, ge=1)
    max_prompts: int | None = Field(default=None, ge=1)
    patience: int = Field(default=32, ge=1)
    sampling: Sampling = Sampling(repetition_penalty=1.5)
    filters: FilterSettings = FilterSettings()


class ResponseSettings(ChatSection):
    """How an instruction is answered; several `samples` per instruction are siblings for a preference.

    `cut`: what happens to answers that reach `max_new_tokens`. A student trained on them learns to stop in the middle
    of a sentence ("keep"); "trim" ends them after their last whole sentence and drops those without one.
    """

    samples: int = Field(default=1, ge=1)
    cut: Literal["keep", "trim", "drop"] = "keep"
    sampling: Sampling = Sampling(temperature=0.6)


class SplitSettings(Section):
    """Rows of the warm-up set, of the probing set, and of the final set of each round.

    `leakage`: what happens when a seed is also in the reference or evaluation set, or the two ask the same.
    """

    warmup: int = Field(default=1000, ge=1)
    probe: int = Field(default=10000, ge=1)
    final: int = Field(default=10000, ge=1)
    leakage: Literal["refuse", "allow"] = "refuse"


@dataclass(frozen=True)
class Recipe:
    """Everything that the text of one stage depends on besides the teacher.

    `seeds`: instructions to draw examples from. `held_out`: instructions of the reference and evaluation
    sets, which no kept instruction may resemble. `label` starts every id ("r1"); together with `seed` it
    decides all randomness. `optimise`: whether an instruction's or a response's siblings are compared.
    """

    generate: GenerateSettings
    responses: ResponseSettings
    seeds: Sequence[str]
    held_out: Sequence[str]
    label: str
    seed: int
    optimise: Literal["instruction", "response"] = "instruction"


@dataclass
class Generated:
    """Kept rows in the order they were written, counts by reason, and tokens written."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0


def write_sets(recipe: Recipe, split: SplitSettings, engine: Engine, out: Path, progress: bool = True) -> Generated:
    """Write `out`/warmup.jsonl and `out`/probe.jsonl, disjoint by prompt, with counts and rejected samples.

    Goes on from the samples that an interrupted call left in `out`, with the same result. Raises DataError
    where the teacher's text does not do.
    """
    # The prompt that fills the warm-up set may have siblings left over.
    needed = split.warmup + split.probe + recipe.generate.samples_per_prompt * recipe.responses.samples - 1
    made = _write(recipe, engine, needed, out, progress)
    warmup, probe = divide(made.rows, split.warmup, derive_seed(recipe.seed, recipe.label, "split"))
    write_jsonl(out / "warmup.jsonl", warmup)
    write_jsonl(out / "probe.jsonl", probe[: split.probe])
    return made


def write_final(recipe: Recipe, rows: int, engine: Engine, out: Path, progress: bool = True) -> Generated:
    """Write `out`/final.jsonl with `rows` rows, as `write_sets` does."""
    made = _write(recipe, engine, rows, out, progress)
    write_jsonl(out / "final.jsonl", made.rows[:rows])
    return made


def divide(rows: Sequence[dict[str, Any]], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`size` rows, and the rows of the prompts that they do not come from; prompts are drawn at random."""
    names = list(dict.fromkeys(_origin(row) for row in rows))
    random.Random(seed).shuffle(names)
    wanted: set[str] = set()
    count = 0
    per_name = Counter(_origin(row) for row in rows)
    while count < size:
        name = names[len(wanted)]
        wanted.add(name)
        count += per_name[name]
    return [row for row in rows if _origin(row) in wanted][:size], [row for row in rows if _origin(row) not in wanted]


def check_leakage(seeds: Sequence[str], held_out: Sequence[str], leakage: str) -> None:
    """Raise DataError when seeds are also in the reference or evaluation set, unless that is allowed."""
    known = {prompts.plain(text) for text in held_out}
    shared = [text for text in seeds if prompts.plain(text) in known]
    if shared and leakage == "refuse":
        raise DataError(
            f"{len(shared)} of {len(seeds)} seeds are also in the reference or evaluation set, such as "
            f"{reprlib.repr(shared[0])}: use other seeds, or set split.leakage=allow"
        )


def _origin(row: dict[str, Any]) -> str:
    """The prompt that the row's instruction came from, whatever is compared within the round."""
    return "-".join(row["id"].split("-")[:2])


def _write(recipe: Recipe, engine: Engine, needed: int, out: Path, progress: bool) -> Generated:
    reasons = [recipe.generate.filters.rejection(seed) for seed in recipe.seeds]
    usable = [seed for seed, reason in zip(recipe.seeds, reasons, strict=True) if reason is None]
    examples = recipe.generate.seed_examples + recipe.generate.own_examples
    if len(usable) < examples:
        dropped = Counter(reason for reason in reasons if reason is not None)
        why = ", ".join(f"{name} {count}" for name, count in sorted(dropped.items()))
        raise DataError(
            f"seeds: expected at least {examples} instructions that pass generate.filters, got {len(usable)} of "
            f"{len(recipe.seeds)}{f' ({why})' if why else ''}: give more seeds, change the filters, or use fewer "
            "examples in a prompt"
        )
    journal = ScoreJournal(out / SAMPLES_FILE)
    with (
        journal.opened({"seed": recipe.seed, "label": recipe.label}),
        tqdm(total=needed, desc=out.name, unit="row", disable=not progress) as bar,
    ):
        writer = _Writer(recipe, engine, SampleMemory(journal), usable)
        for kept in writer.waves(needed):
            bar.update(min(kept, needed) - bar.n)
    made = writer.made
    write_json(out / COUNTS_FILE, {"rows": len(made.rows), "tokens": made.tokens, **made.counts})
    write_jsonl(out / REJECTED_FILE, made.rejected)
    return made


class _Writer:
    """Waves of prompts until enough rows are kept."""

    def __init__(self, recipe: Recipe, engine: Engine, memory: SampleMemory, seeds: list[str]) -> None:
        self.recipe, self.engine, self.memory, self.seeds = recipe, engine, memory, seeds
        self.made = Generated()
        self.kept: list[str] = []
        self._index = RougeIndex(recipe.generate.filters.rouge)
        self._held_out = RougeIndex(min(recipe.generate.filters.rouge, LEAK), recipe.held_out)

    def waves(self, needed: int) -> Iterator[int]:
        """Write wave after wave; yields the number of rows kept so far."""
        settings, per_prompt = (
            self.recipe.generate,
            self.recipe.generate.samples_per_prompt * self.recipe.responses.samples,
        )
        most = settings.max_prompts or 8 * -(-needed // per_prompt)
        start = 0
        while len(self.made.rows) < needed:
            if start >= most:
                raise DataError(
                    f"{len(self.made.rows)} of {needed} rows kept after {start} prompts ({self._reasons()}): ask for "
                    "fewer rows, relax generate.filters, or raise generate.max_prompts"
                )
            # The last wave is no larger than the yield so far asks for.
            missing = (needed - len(self.made.rows)) * start
            likely = -(-missing // len(self.made.rows)) if self.made.rows else most
            end = start + min(settings.prompts_per_wave, likely, most - start)
            self._wave(range(start, end))
            start = end
            self._check_marks(start)
            yield len(self.made.rows)

    def _wave(self, numbers: range) -> None:
        asked = [self._prompt(number) for number in numbers]
        requests = [
            self._request(f"{prompt_id}-{sibling}", prompt, "instruction")
            for prompt_id, prompt, _ in asked
            for sibling in range(self.recipe.generate.samples_per_prompt)
        ]
        samples = self._complete(requests, self.recipe.generate.sampling, (prompts.CLOSE,))
        self.made.counts["prompts"] += len(asked)
        accepted = []
        for place, (request, sample) in enumerate(zip(requests, samples, strict=True)):
            examples = asked[place // self.recipe.generate.samples_per_prompt][2]
            instruction = self._accept(sample, examples)
            if instruction is not None:
                accepted.append((request, sample, instruction))
        self._answer(accepted)

    def _prompt(self, number: int) -> tuple[str, str, list[str]]:
        """Id, text and examples of a prompt."""
        prompt_id = f"{self.recipe.label}-{number:06d}"
        generator = random.Random(derive_seed(self.recipe.seed, prompt_id, "examples"))
        for _ in range(_DRAWS):
            prompt, examples = self._draw(generator)
            if self.engine.fits(prompt):
                break
        return prompt_id, prompt, examples

    def _draw(self, generator: random.Random) -> tuple[str, list[str]]:
        """Text and examples of a prompt."""
        settings = self.recipe.generate
        own = settings.own_examples if len(self.kept) >= settings.own_examples else 0
        examples = generator.sample(self.seeds, settings.seed_examples + settings.own_examples - own)
        examples += generator.sample(self.kept, own)
        tokenizer = self.engine.tokenizer
        if settings.style == "completion":
            return prompts.completion_prompt(tokenizer, examples), examples
        return prompts.chat_prompt(tokenizer, examples, **settings.chat), examples

    def _accept(self, sample: Sample, examples: Sequence[str]) -> str | None:
        settings = self.recipe.generate
        instruction = prompts.find_instruction(sample.text, settings.style)
        reason = settings.filters.rejection(instruction)
        if reason is None and instruction is not None:
            if self._index.is_close(instruction, examples):
                reason = "similar"
            elif self._held_out.is_close(instruction):
                reason = "leak"
        if reason is None and instruction is not None:
            self._index.add(instruction)
            self.kept.append(instruction)
            return instruction
        self._reject(reason or "empty", sample.text)
        return None

    def _answer(self, accepted: list[tuple[Request, Sample, str]]) -> None:
        settings = self.recipe.responses
        asked = []
        for entry in accepted:
            prompt = prompts.ask(self.engine.tokenizer, entry[2], **settings.chat)
            if self.engine.fits(prompt):
                asked.append((entry, prompt))
            else:
                self._reject("too_long_to_answer", entry[2])
        requests = [
            self._request(f"{request.id}-{number}", prompt, "response")
            for (request, _, _), prompt in asked
            for number in range(settings.samples)
        ]
        answers = self._complete(requests, settings.sampling, ())
        for place, (question, answer) in enumerate(zip(requests, answers, strict=True)):
            request, sample, instruction = asked[place // settings.samples][0]
            # Thoughts that the prompt has begun are the answer's, which a student learns with their mark.
            opened = prompts.opening_thought(question.prompt)
            if not prompts.outside_thoughts(opened + answer.text).strip():
                self._reject("empty_response", instruction)
                continue
            text = self._uncut(answer, opened)
            if text is None:
                self._reject("cut_response", answer.text)
                continue
            response = opened + text
            if self.recipe.optimise == "response":
                # Of a trimmed answer the ids say more than the text.
                written = answer if text == answer.text else replace(answer, text=text, ids=None)
                row = _row(question, written, instruction, response, answer.finish == "stop")
            else:
                # It ends with the closing mark, which stands in the text.
                row = _row(request, sample, instruction, response, False)
            self.made.rows.append(row)

    def _uncut(self, answer: Sample, opened: str) -> str | None:
        """The answer as the settings want it where the limit cut it, None to drop it; `opened` stands before it."""
        cut = self.recipe.responses.cut
        if answer.finish != "length":
            return answer.text
        response = {"keep": answer.text, "trim": whole_sentences(answer.text), "drop": None}[cut]
        if response is None or not prompts.outside_thoughts(opened + response).strip():
            return None
        self.made.counts["cut_responses_kept" if cut == "keep" else "cut_responses_trimmed"] += 1
        return response

    def _request(self, name: str, prompt: str, part: str) -> Request:
        return Request(name, prompt, derive_seed(self.recipe.seed, name, part))

    def _complete(self, requests: list[Request], sampling: Sampling, stop: Sequence[str]) -> list[Sample]:
        samples = self.memory.complete(self.engine, requests, sampling, stop)
        self.made.tokens += sum(sample.num_tokens for sample in samples)
        return samples

    def _reject(self, reason: str, text: str) -> None:
        self.made.counts[reason] += 1
        if self.made.counts[reason] <= _REJECTED_SHOWN:
            self.made.rejected.append({"reason": reason, "text": text})

    def _check_marks(self, tried: int) -> None:
        counts = self.made.counts
        samples = tried * self.recipe.generate.samples_per_prompt
        if tried >= self.recipe.generate.patience and counts["marks_missing"] == samples:
            shown = "; ".join(repr(row["text"][:80]) for row in self.made.rejected[:3])
            raise DataError(
                f"none of {samples} samples has an instruction between the marks, such as {shown}: try "
                "generate.style=completion, a lower repetition_penalty, or another teacher"
            )

    def _reasons(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.made.counts.items()))


def whole_sentences(text: str) -> str | None:
    """`text` up to the end of its last whole sentence or paragraph, None where there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else None


def _row(request: Request, written: Sample, instruction: str, response: str, ends: bool) -> dict[str, Any]:
    """`ends`: whether the teacher ended the completion with an end-of-text token, which stands in its ids."""
    prompt_id, _, sibling = request.id.rpartition("-")
    return {
        "id": request.id,
        "prompt_id": prompt_id,
        "sibling": int(sibling),
        "prompt": request.prompt,
        "completion": written.text,
        "completion_ids": written.ids,
        "ends": ends,
        "instruction": instruction,
        "response": response,
    }
