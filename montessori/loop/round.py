"""One round of the loop, and the run that strings rounds together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from montessori import processes
from montessori.data import load_rows
from montessori.errors import ArgumentError
from montessori.loop import evaluate, generate, pairs, report, score, train, tune, warmup
from montessori.loop.config import Config, write_config
from montessori.loop.engines import UNSEEN, Engine, derive_seed, open_engine, tokens_written
from montessori.loop.generate import Recipe
from montessori.loop.inputs import by_content, identity, text_digest
from montessori.loop.judge import open_judge
from montessori.loop.material import Material
from montessori.loop.preflight import check_config, check_place, check_rows
from montessori.loop.rundir import RunDirectory
from montessori.loop.signals import around_median, from_scores
from montessori.models import free_models
from montessori.runs import versions
from montessori.scores import Scores
from montessori.writing import write_json, write_jsonl

STAGES = ("generate", "warmup", "score", "pairs", "tune", "regenerate", "train", "evaluate")
# Under torchrun the processes share the work of these; the others are done by the first while the rest wait.
SHARED_STAGES = ("warmup", "score", "tune", "train")
UNTUNED_STAGES = ("regenerate", "train", "evaluate")
CONFIG_FILE = "config.yaml"

# What each stage depends on: settings by name, and the stages whose output it reads.
_READS = {
    "generate": ("generate", "responses", "split", "engine", "optimise"),
    "warmup": ("student", "warmup"),
    "score": ("score",),
    "pairs": ("signal", "judge", "pairs"),
    "tune": ("tune",),
    "regenerate": ("generate", "responses", "split", "engine"),
    "train": ("student", "train"),
    "evaluate": ("evaluate", "score", "judge", "engine"),
}
_AFTER = {
    "generate": (),
    "warmup": ("generate",),
    "score": ("warmup",),
    "pairs": ("score",),
    "tune": ("pairs",),
    "regenerate": ("tune",),
    "train": ("regenerate",),
    "evaluate": ("train",),
}


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of a round of this run, in order."""
    return STAGES if config.teacher_mode == "tuned" else UNTUNED_STAGES


def run(
    config: Config,
    path: Path,
    *,
    until: str | None = None,
    only: str | None = None,
    since: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Path | None:
    """Work through all rounds of `config` in the directory `path`; return the report once all is done.

    What is finished there is kept, what was cut short goes on. `until`: last stage of the last round.
    `only`: that stage alone, in the first round that lacks it, else the last, from what the stages before it left.
    `since`: redo that stage, in the last round that has it or in the one named (`round_1/tune`), and go on; all before
    it must be done. `fresh`: redo what is run, whatever is there.
    What comes after a stage that is redone is deleted: it was made from what is no longer there.
    Raises MontessoriError: one line.
    """
    names = stages_of(config)
    of_round, since = _named(since, config.rounds)
    for option, name in (("--until", until), ("--from", since), ("stage", only)):
        if name is not None and name not in names:
            raise ArgumentError(f"{option} {name}: expected one of {', '.join(names)}")
    # One process looks: it may delete what it found before the others have looked.
    number = processes.from_main(_round_of(RunDirectory(path), config.rounds, only, since, of_round))
    if since is not None:
        if fresh:
            raise ArgumentError(f"--from {since} with --fresh, which redoes all stages: expected one of the two")
        _check_before(RunDirectory(path), names, number, since)
        if until is not None and number == config.rounds and names.index(until) < names.index(since):
            raise ArgumentError(f"--until {until}: expected --from {since} or a stage after it")
    check_config(config)
    check_place(path, config)
    if {until, only} <= {None, "evaluate"}:
        evaluate.check(config.evaluate)
    with ExitStack() as stack:
        material = Material.read(config)
        check_rows(config, material.reference, material.evaluation)
        directory = stack.enter_context(RunDirectory(path))
        engine = open_engine(config.engine)
        stack.callback(engine.release)
        rounds = [Round(config, directory, material, n, engine, progress) for n in range(1, config.rounds + 1)]
        first = only if fresh else since
        current = rounds[number - 1]
        if first is not None or not fresh:
            # Before anything is deleted.
            for one in rounds[: current.number if first is not None else None]:
                if not one.check(first if one is current else None):
                    break
        if first is not None or fresh:
            _forget(directory, current if first is not None else None, first)
        _start(config, directory, material)
        if only is not None:
            current.work(only)
            return None
        for current in rounds:
            for name in names:
                current.work(name)
                if name == until and current is rounds[-1]:
                    return None
        return report.run(path, directory.costs()) if processes.is_main() else None


class Round:
    """The stages of round `number`, each a method of its name: it reads what earlier stages wrote to disk."""

    def __init__(
        self, config: Config, run: RunDirectory, material: Material, number: int, engine: Engine, progress: bool
    ) -> None:
        self.config, self.run, self.material, self.number = config, run, material, number
        self.engine, self.progress = engine, progress
        self.name = f"round_{number}"

    def is_done(self, stage: str) -> bool:
        return self.run.is_done(f"{self.name}/{stage}")

    def exists(self, stage: str) -> bool:
        return self.run.exists(f"{self.name}/{stage}")

    def check(self, until: str | None = None) -> bool:
        """Whether all stages, those before `until` if given, are done.

        Raises ArgumentError if one that is there was made from other inputs than it would be now.
        """
        names = stages_of(self.config)
        if until != names[0]:
            self._check_mode(names)
        for name in names:
            if name == until:
                return True
            if not self.exists(name):
                return False
            self.run.check(f"{self.name}/{name}", self.inputs(name))
            if not self.is_done(name):
                return False
        return True

    def _check_mode(self, names: Sequence[str]) -> None:
        """Raise ArgumentError where what is there was made with the other `teacher_mode`: now, and not when the stages
        that it lacks are done."""
        first = next((name for name in STAGES if self.exists(name)), names[0])
        made, mode = "untuned" if first in UNTUNED_STAGES else "tuned", self.config.teacher_mode
        if made != mode:
            raise ArgumentError(
                f"{self.run.path / self.name}: was made with another teacher_mode ({made!r}, now {mode!r}); use the "
                f"same, another --out, or redo all of it: montessori run --from {self.name}/{names[0]}"
            )

    def work(self, name: str) -> None:
        """Run the stage `name` unless it is done."""
        stage: Callable[[Path], dict[str, Any]] = getattr(self, name)
        with self.run.stage(f"{self.name}/{name}", self.inputs(name)) as work:
            if not work.done and (processes.is_main() or name in SHARED_STAGES):
                if self.progress and processes.is_main():
                    print(f"{self.name}/{name}", file=sys.stderr)
                facts = stage(work.path)
                free_models()
                work.tokens = facts.pop("tokens", 0)
                work.facts = facts

    def inputs(self, stage: str) -> dict[str, Any]:
        """Everything that the output of `stage` depends on, as plain values."""
        settings = by_content(self.config.model_dump(mode="json", include={"seed", *_READS[stage]}))
        before = [name for name in _AFTER[stage] if name in stages_of(self.config)]
        inputs: dict[str, Any] = {**settings, **{name: self.run.digest(f"{self.name}/{name}") for name in before}}
        if stage == "regenerate" and not before:
            inputs["optimise"] = self.config.optimise
        if not before:
            inputs["teacher"] = identity(self.config.teacher)
            if self.number > 1:
                inputs["teacher"] = self.run.digest(f"round_{self.number - 1}/tune")
        if "student" in settings:
            inputs["student"] = identity(self.config.student)
        judge = settings.get("judge")
        asked = self.config.signal.kind == "judge" if stage == "pairs" else self.config.evaluate.answers.count > 0
        if judge and not asked:
            inputs["judge"] = None
        elif judge:
            judge["engine"] = {key: value for key, value in judge["engine"].items() if key not in UNSEEN}
            judge["model"] = identity(judge["model"])
        if "engine" in settings:
            inputs["engine"] = {key: value for key, value in settings["engine"].items() if key not in UNSEEN}
        if stage in ("generate", "regenerate"):
            ours = ("final",) if stage == "regenerate" else ("warmup", "probe")
            # It bounds the tries: a stage that reached it goes on under a higher one.
            inputs["generate"] = settings["generate"] | {"max_prompts": None}
            inputs["split"] = {key: settings["split"][key] for key in ours}
            inputs["seeds"] = text_digest(self.material.seeds)
            inputs["held_out"] = text_digest(self.material.held_out)
        if stage in ("score", "evaluate"):
            inputs["reference"] = text_digest(self.material.reference.rows)
        if stage == "evaluate":
            inputs["evaluation"] = text_digest(self.material.evaluation.rows)
        return inputs

    # The stages.

    def generate(self, out: Path) -> dict[str, Any]:
        self.engine.load(self._teacher())
        made = generate.write_sets(
            self._recipe(f"r{self.number}"), self.config.split, self.engine, out, progress=self.progress
        )
        self.engine.release()
        return {"tokens": made.tokens, **made.counts}

    def warmup(self, out: Path) -> dict[str, Any]:
        data = self._folder("generate") / "warmup.jsonl"
        return warmup.run(
            self.config.warmup, self.config.student, data, out, seed=self.config.seed, progress=self.progress
        )

    def score(self, out: Path) -> dict[str, Any]:
        return score.run(
            self.config.score,
            warmup.checkpoint(self._folder("warmup")),
            self._folder("generate") / "probe.jsonl",
            self.material.reference,
            out,
            max_grad_norm=self.config.warmup.max_grad_norm,
            progress=self.progress,
        )

    def pairs(self, out: Path) -> dict[str, Any]:
        rows = load_rows(self._folder("generate") / "probe.jsonl")
        tokens = 0
        if self.config.signal.kind == "judge" and self.config.judge is not None:
            with open_judge(self.config.judge, out) as judge:
                signal = around_median("judge", judge.grade(rows))
                tokens = judge.tokens
        else:
            score.check_candidates(self._folder("generate") / "probe.jsonl", self._folder("score"))
            scores = Scores.load(self._folder("score") / score.SCORES_FILE)
            signal = from_scores(self.config.signal, scores, derive_seed(self.config.seed, self.name, "signal"))
        summary = pairs.run(self.config.pairs, rows, signal, out)
        return {"tokens": tokens, "num_pairs": summary["num_pairs"]}

    def tune(self, out: Path) -> dict[str, Any]:
        data = self._folder("pairs") / pairs.PAIRS_FILE
        return tune.run(self.config.tune, self._teacher(), data, out, seed=self.config.seed, progress=self.progress)

    def regenerate(self, out: Path) -> dict[str, Any]:
        tuned = self.config.teacher_mode == "tuned"
        self.engine.load(self._folder("tune") / tune.TEACHER if tuned else self.config.teacher)
        recipe = self._recipe(f"f{self.number}")
        # Siblings serve a preference; the student gets one answer to each instruction.
        recipe = replace(recipe, responses=recipe.responses.model_copy(update={"samples": 1}))
        made = generate.write_final(recipe, self.config.split.final, self.engine, out, progress=self.progress)
        self.engine.release()
        return {"tokens": made.tokens, **made.counts}

    def train(self, out: Path) -> dict[str, Any]:
        data = self._folder("regenerate") / "final.jsonl"
        return train.run(
            self.config.train, self.config.student, data, out, seed=self.config.seed, progress=self.progress
        )

    def evaluate(self, out: Path) -> dict[str, Any]:
        tuned = self.config.teacher_mode == "tuned"
        # Without a warm-up there is no optimizer state to measure influence with.
        settings = self.config.evaluate if tuned else self.config.evaluate.model_copy(update={"sample": 0})
        evaluate.run(
            settings,
            student=self._folder("train") / train.STUDENT,
            base=self.config.student,
            warm_student=warmup.checkpoint(self._folder("warmup")) if tuned else self.config.student,
            evaluation=self.material.evaluation,
            reference=self.material.reference,
            files={
                "tuned": self._folder("regenerate") / "final.jsonl",
                "untuned": self._folder("generate") / "probe.jsonl",
            },
            out=out,
            seed=self.config.seed,
            engine=self.engine,
            judge=self.config.judge,
            progress=self.progress,
            device=self.config.score.device,
            reference_weighting=self.config.score.reference_weighting,
            max_length=self.config.score.max_length,
            **self.config.score.chat,
            max_grad_norm=self.config.warmup.max_grad_norm,
        )
        # Of answers and of verdicts.
        return {"tokens": tokens_written([*out.glob("answers.*.jsonl"), *out.glob("judge.*.jsonl")])}

    def _folder(self, stage: str) -> Path:
        return self.run.path / self.name / stage

    def _teacher(self) -> str | Path:
        """The teacher that this round starts from."""
        if self.number == 1:
            return self.config.teacher
        return self.run.path / f"round_{self.number - 1}" / "tune" / tune.TEACHER

    def _recipe(self, label: str) -> Recipe:
        config = self.config
        return Recipe(
            config.generate,
            config.responses,
            self.material.seeds,
            self.material.held_out,
            label,
            config.seed,
            config.optimise,
        )


def _named(since: str | None, rounds: int) -> tuple[int | None, str | None]:
    """Number of the round, where it is named, and stage of `round_1/tune` or `tune`."""
    folder, slash, stage = (since or "").rpartition("/")
    if not slash:
        return None, since
    number = folder.removeprefix("round_")
    if not (folder.startswith("round_") and number.isdecimal() and 1 <= int(number) <= rounds):
        raise ArgumentError(f"--from {since}: expected a stage, or round_N/stage with N from 1 to {rounds}")
    return int(number), stage


def _round_of(run: RunDirectory, rounds: int, only: str | None, since: str | None, of_round: int | None) -> int:
    """Number of the round that begins again with `since`, or that does `only`; the last where neither is given."""
    numbers = range(1, rounds + 1)
    if since is not None:
        return of_round or next((n for n in reversed(numbers) if run.exists(f"round_{n}/{since}")), 1)
    return next((n for n in numbers if only and not run.is_done(f"round_{n}/{only}")), rounds)


def _check_before(run: RunDirectory, names: Sequence[str], number: int, since: str) -> None:
    """Raise ArgumentError unless all that comes before the stage `since` of round `number` is done."""
    for n in range(1, number + 1):
        for name in names if n < number else names[: names.index(since)]:
            if not run.is_done(f"round_{n}/{name}"):
                raise ArgumentError(
                    f"--from {since}: expected the stages before it, but {run.path / f'round_{n}' / name} is not "
                    "finished; leave --from out to go on from there"
                )


def _forget(run: RunDirectory, first_round: Round | None, first: str | None) -> None:
    """Delete the stages of a round from `first` on, and all later rounds; all rounds where none is given."""
    kept = 0 if first_round is None else first_round.number
    # The last first, so that a kill in between leaves no stage without those that it was made from.
    # Of all processes together: one that sees less would wait less often.
    for folder in reversed(processes.from_main([folder.name for folder in run.rounds()])):
        if int(folder.removeprefix("round_")) > kept:
            run.drop(folder)
    if first_round is not None and first is not None:
        # Before the first stage of an untuned round are those that it may have had as a tuned one.
        begun = 0 if first == stages_of(first_round.config)[0] else STAGES.index(first)
        for name in reversed(STAGES[begun:]):
            run.drop(f"{first_round.name}/{name}")


def _start(config: Config, run: RunDirectory, material: Material) -> None:
    """Write config, versions and the rows of reference and evaluation."""
    if processes.is_main():
        write_config(config, run.path / CONFIG_FILE)
        write_json(run.path / "run.json", {"versions": versions(), "seed": config.seed})
        # Columns that nothing reads may hold anything.
        write_jsonl(run.path / "reference.jsonl", material.reference.rows, default=str)
        write_jsonl(run.path / "evaluation.jsonl", material.evaluation.rows, default=str)
    processes.wait_for_all()
