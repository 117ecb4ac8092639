"""The generate stage: what is kept, how it is divided, and that a killed run ends with the same bytes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from loop_models import make_word_tokenizer

from montessori.errors import DataError, ResourceError
from montessori.loop.engines import BatchedEngine, Sample, Sampling
from montessori.loop.generate import (
    GenerateSettings,
    Recipe,
    ResponseSettings,
    SplitSettings,
    check_leakage,
    divide,
    whole_sentences,
    write_final,
    write_sets,
)
from montessori.loop.prompts import CLOSE, OPEN

SEEDS = [f"Seed task {word} about {word}ing {word}s" for word in "abcdefghij"]


class Speller(BatchedEngine):
    """An engine whose text is a function of the request: five words spelled from the seed, in batches of three."""

    tokenizer = make_word_tokenizer()

    def __init__(self, dies_after=None, text=None, refuses=lambda prompt: False):
        self.calls, self.dies_after, self.text, self.prompts = 0, dies_after, text, []
        self.refuses = refuses

    def load(self, model):
        pass

    def release(self):
        pass

    def fits(self, prompt):
        return not self.refuses(prompt)

    def batches(self, requests):
        return [list(requests[start : start + 3]) for start in range(0, len(requests), 3)]

    def generate(self, requests, sampling, stop=()):
        if self.calls == self.dies_after:
            raise ResourceError("pulled plug")
        self.calls += 1
        self.prompts += [request.prompt for request in requests]
        return [self.sample(request, stop) for request in requests]

    def sample(self, request, stop):
        if stop and self.text is not None:
            return Sample(self.text, 3, "length")
        words = [f"w{(request.seed >> 8 * place) % 251}" for place in range(5)]
        return Sample(" ".join(words) + "".join(stop), 6, "stop")


def recipe(**changes):
    settings = {"style": "completion", "seed_examples": 3, "own_examples": 2, "prompts_per_wave": 2, **changes}
    return Recipe(GenerateSettings(**settings), ResponseSettings(), SEEDS, [], "r1", 7)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_sets_are_as_large_as_asked_and_share_no_prompt(tmp_path):
    write_sets(recipe(), SplitSettings(warmup=6, probe=13), Speller(), tmp_path, progress=False)
    warmup, probe = read(tmp_path / "warmup.jsonl"), read(tmp_path / "probe.jsonl")
    assert (len(warmup), len(probe)) == (6, 13)
    assert not {row["prompt_id"] for row in warmup} & {row["prompt_id"] for row in probe}
    assert len({row["id"] for row in warmup + probe}) == 19
    for row in warmup + probe:
        assert row["id"] == f"{row['prompt_id']}-{row['sibling']}"
        assert row["completion"] == f"{row['instruction']}{CLOSE}" and not row["ends"]
        assert row["response"].startswith("w") and row["prompt"].endswith(OPEN)
    siblings = [row for row in probe if row["prompt_id"] == probe[0]["prompt_id"]]
    assert len({row["prompt"] for row in siblings}) == 1 and len({row["completion"] for row in siblings}) > 1


def test_later_prompts_hold_examples_of_their_own_kind(tmp_path):
    engine = Speller()
    made = write_final(recipe(), 20, engine, tmp_path, progress=False)
    prompts = dict.fromkeys(prompt for prompt in engine.prompts if prompt.endswith(OPEN))
    own = [sum(f"{OPEN}{row['instruction']}{CLOSE}" in prompt for row in made.rows) for prompt in prompts]
    seeds = [sum(f"{OPEN}{seed}{CLOSE}" in prompt for seed in SEEDS) for prompt in prompts]
    assert own[:2] == [0, 0] and seeds[:2] == [5, 5]
    assert set(own[2:]) == {2} and set(seeds[2:]) == {3}


def test_a_prompt_that_does_not_fit_takes_other_examples(tmp_path):
    engine = Speller(refuses=lambda prompt: SEEDS[0] in prompt)
    write_final(recipe(own_examples=0), 20, engine, tmp_path, progress=False)
    assert not any(SEEDS[0] in prompt for prompt in engine.prompts)


def test_an_instruction_too_long_to_answer_is_rejected_and_counted(tmp_path):
    long = re.compile(r"\bw1\d\b")
    asked = []

    def is_too_long(prompt):
        asked.append(prompt)
        return not prompt.endswith(OPEN) and long.search(prompt) is not None

    made = write_final(recipe(), 20, Speller(refuses=is_too_long), tmp_path, progress=False)
    assert made.counts["too_long_to_answer"] > 0
    # To ask takes the whole prompt to be cut into tokens.
    assert len(asked) == len(set(asked))
    assert len(made.rows) >= 20 and not any(long.search(row["instruction"]) for row in made.rows)


@pytest.mark.parametrize("calls", [0, 1, 4, 9])
def test_a_killed_run_ends_with_the_same_bytes_and_writes_nothing_twice(calls, tmp_path):
    split = SplitSettings(warmup=5, probe=12)
    whole = Speller()
    write_sets(recipe(), split, whole, tmp_path / "whole", progress=False)
    with pytest.raises(ResourceError):
        write_sets(recipe(), split, Speller(dies_after=calls), tmp_path / "cut", progress=False)
    # A kill in the middle of a write leaves part of a line.
    with (tmp_path / "cut" / "samples.jsonl").open("ab") as file:
        file.write(b'{"samples": [{"id"')
    rest = Speller()
    write_sets(recipe(), split, rest, tmp_path / "cut", progress=False)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert rest.calls == whole.calls - calls


def test_another_seed_writes_other_text(tmp_path):
    for seed in (1, 2):
        write_final(replace(recipe(), seed=seed), 8, Speller(), tmp_path / str(seed), progress=False)
    assert files(tmp_path / "1")["final.jsonl"] != files(tmp_path / "2")["final.jsonl"]


def test_rejections_are_counted_and_shown(tmp_path):
    class Mixed(Speller):
        def sample(self, request, stop):
            sample = super().sample(request, stop)
            if not stop:
                return replace(sample, text=" ") if request.seed % 4 == 0 else sample
            broken = {0: SEEDS[0] + CLOSE, 1: "no mark", 2: f"Draw a picture{CLOSE}"}
            return replace(sample, text=broken.get(request.seed % 6, sample.text))

    made = write_final(recipe(own_examples=0, seed_examples=10), 12, Mixed(), tmp_path, progress=False)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["rows"] == len(made.rows) >= 12
    for reason in ("similar", "marks_missing", "blocked_word", "empty_response"):
        assert counts[reason] > 0
    samples = counts["prompts"] * 4
    assert samples == counts["rows"] + sum(
        counts[r] for r in ("similar", "marks_missing", "blocked_word", "empty_response")
    )
    rejected = read(tmp_path / "rejected.jsonl")
    assert {"reason": "marks_missing", "text": "no mark"} in rejected
    assert all(sum(row["reason"] == reason for row in rejected) <= 5 for reason in counts)


def test_responses_that_reach_the_limit_are_kept_or_dropped_or_end_with_a_sentence(tmp_path):
    text = "cut"

    class Cut(Speller):
        def sample(self, request, stop):
            sample = super().sample(request, stop)
            sample = replace(sample, ids=[1, 2])
            return sample if stop or request.seed % 2 else replace(sample, text=text, finish="length")

    kept = write_final(recipe(), 16, Cut(), tmp_path / "keep", progress=False)
    assert kept.counts["cut_responses_kept"] == sum(row["response"] == "cut" for row in kept.rows) > 0
    dropping = replace(recipe(), responses=ResponseSettings(cut="drop"))
    dropped = write_final(dropping, 16, Cut(), tmp_path / "drop", progress=False)
    assert dropped.counts["cut_response"] > 0 and all(row["response"] != "cut" for row in dropped.rows)
    assert len(dropped.rows) >= 16
    trimming = replace(recipe(), responses=ResponseSettings(cut="trim"))
    assert write_final(trimming, 16, Cut(), tmp_path / "none", progress=False).rows == dropped.rows
    text = "A whole one. And a"
    trimmed = write_final(trimming, 16, Cut(), tmp_path / "trim", progress=False)
    ended = sum(row["response"] == "A whole one." for row in trimmed.rows)
    assert trimmed.counts["cut_responses_trimmed"] == ended > 0
    assert trimmed.counts["cut_response"] == 0
    # The ids of what a teacher may be tuned on are those of its text: of a trimmed one they would say more.
    answers = write_final(replace(trimming, optimise="response"), 16, Cut(), tmp_path / "answers", progress=False)
    assert {tuple(row["completion_ids"] or ()) for row in answers.rows} == {(), (1, 2)}
    for row in answers.rows:
        assert (row["completion_ids"] is None) == (row["completion"] == "A whole one.")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two. Thr", "One. Two."),
        ('He said "Go." Then', 'He said "Go."'),
        ("It costs 3.5 euros and", None),
        ("1. Apples\n2. Pe", None),
        ("Good morning!\n\n1. Wake up\n2. Ea", "Good morning!"),
        ("The first part\n\nThe second", "The first part"),
        ("Ingredients:\n\nflour", None),
        ("你好。再", "你好。"),
        ("", None),
    ],
)
def test_a_cut_text_ends_with_its_last_whole_sentence(text, whole):
    assert whole_sentences(text) == whole


def test_thoughts_without_an_answer_are_no_response(tmp_path):
    texts = {
        0: ("<think>Well.</think>\n", "stop"),
        1: ("<think>Well. Then", "length"),
        2: ("<think>Well.</think>Yes.", "stop"),
    }

    class Thinker(Speller):
        def sample(self, request, stop):
            sample = super().sample(request, stop)
            if stop:
                return sample
            text, finish = texts[request.seed % 3]
            return replace(sample, text=text, finish=finish)

    trimming = replace(recipe(), responses=ResponseSettings(cut="trim"))
    made = write_final(trimming, 8, Thinker(), tmp_path, progress=False)
    assert {row["response"] for row in made.rows} == {"<think>Well.</think>Yes."}
    assert made.counts["empty_response"] > 0


def test_thoughts_that_the_prompt_begins_belong_to_the_response(tmp_path):
    texts = {0: ("Well. Then", "length"), 1: ("Well.</think>Yes.", "stop"), 2: ("Well.</think>Yes. And", "length")}

    class Thinker(Speller):
        def sample(self, request, stop):
            sample = super().sample(request, stop)
            text, finish = texts[request.seed % 3]
            return sample if stop else replace(sample, text=text, finish=finish)

    template = tmp_path / "thinking.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n")
    thinking = replace(recipe(), responses=ResponseSettings(cut="trim", chat_template=str(template)))
    made = write_final(thinking, 8, Thinker(), tmp_path / "final", progress=False)
    assert {row["response"] for row in made.rows} == {"<think>Well.</think>Yes."}
    assert made.counts["empty_response"] > 0 and made.counts["cut_responses_trimmed"] > 0


def test_a_teacher_without_marks_is_stopped_early_with_samples(tmp_path):
    engine = Speller(text="I will not")
    with pytest.raises(
        DataError, match=r"none of 16 samples .* 'I will not'; 'I will not'; 'I will not': try"
    ) as caught:
        write_final(recipe(patience=4), 1000, engine, tmp_path, progress=False)
    assert "\n" not in str(caught.value) and engine.calls <= 6


def test_too_few_instructions_say_what_was_rejected(tmp_path):
    engine = Speller(text=f"The same again{CLOSE}")
    with pytest.raises(DataError, match=r"1 of 8 rows kept after 6 prompts \(.*similar 23.*\): ask for fewer"):
        write_final(recipe(max_prompts=6), 8, engine, tmp_path, progress=False)


def test_too_few_seeds(tmp_path):
    with pytest.raises(
        DataError, match=r"expected at least 12 instructions that pass generate\.filters, got 10 of 10: g"
    ):
        write_final(recipe(seed_examples=10), 8, Speller(), tmp_path, progress=False)
    with pytest.raises(DataError, match=r"got 0 of 1 \(blocked_word 1\)"):
        write_final(replace(recipe(), seeds=["Draw a map."]), 8, Speller(), tmp_path, progress=False)


@pytest.mark.parametrize("rouge", [0.7, 1.0])
def test_nothing_that_is_held_out_is_kept(rouge, tmp_path):
    """Whatever the kept may have in common."""
    settings = recipe()
    filters = settings.generate.filters.model_copy(update={"rouge": rouge})
    settings = replace(settings, generate=settings.generate.model_copy(update={"filters": filters}))
    plain = write_final(settings, 8, Speller(), tmp_path / "a", progress=False).rows
    held_out = [plain[2]["instruction"].upper()]
    made = write_final(replace(settings, held_out=held_out), 8, Speller(), tmp_path / "b", progress=False)
    assert made.counts["leak"] == 1
    assert plain[2]["instruction"] not in [row["instruction"] for row in made.rows]


def test_seeds_that_are_held_out_are_refused_unless_allowed():
    with pytest.raises(DataError, match=r"1 of 10 seeds are also in the reference .* split\.leakage=allow"):
        check_leakage(SEEDS, ["other", SEEDS[3].upper() + "  "], "refuse")
    check_leakage(SEEDS, SEEDS, "allow")
    check_leakage(SEEDS, ["other"], "refuse")


def test_siblings_of_one_instruction_where_responses_are_optimised(tmp_path):
    responses = ResponseSettings(samples=3, sampling=Sampling(temperature=0.6))
    both = replace(recipe(samples_per_prompt=2), responses=responses, optimise="response")
    write_sets(both, SplitSettings(warmup=6, probe=12), Speller(), tmp_path, progress=False)
    warmup, probe = read(tmp_path / "warmup.jsonl"), read(tmp_path / "probe.jsonl")
    groups = {}
    for row in probe:
        groups.setdefault(row["prompt_id"], []).append(row)
        assert (
            row["completion"] == row["response"] and row["ends"] and row["prompt"].endswith("<|im_start|> assistant ")
        )
    assert all([row["sibling"] for row in rows] == [0, 1, 2] for rows in groups.values())
    assert all(len({row["instruction"] for row in rows}) == 1 for rows in groups.values())
    assert not {row["id"].split("-")[1] for row in warmup} & {row["id"].split("-")[1] for row in probe}


def test_division_takes_whole_prompts():
    rows = [{"id": f"r1-{prompt:06d}-{sibling}"} for prompt in range(10) for sibling in range(3)]
    first, rest = divide(rows, 7, seed=1)
    assert len(first) == 7 and len(rest) == 21
    assert not {row["id"][:9] for row in first} & {row["id"][:9] for row in rest}
    assert [row["id"] for row in first] == sorted(row["id"] for row in first)
    assert divide(rows, 7, seed=1) == (first, rest) and divide(rows, 7, seed=2) != (first, rest)
