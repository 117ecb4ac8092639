"""The settings of a whole run: one typed tree, presets, files and overrides."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator
from typing_extensions import Self

from montessori.demo import demo_file
from montessori.errors import ArgumentError
from montessori.loop.engines import EngineSettings
from montessori.loop.evaluate import EvaluateSettings
from montessori.loop.generate import GenerateSettings, ResponseSettings, SplitSettings
from montessori.loop.judge import JudgeSettings
from montessori.loop.pairs import PairSettings
from montessori.loop.score import ScoreSettings
from montessori.loop.section import Section
from montessori.loop.signals import SignalSettings
from montessori.loop.train import TrainSettings
from montessori.loop.tune import TuneSettings
from montessori.loop.warmup import WarmupSettings
from montessori.runs import check_audit
from montessori.wording import one_line
from montessori.writing import written_whole

PRESETS = ("demo", "small", "paper")
_PACKAGED = "packaged:"


class DataSettings(Section):
    """Files, dataset directories or hub names; `packaged:NAME` is a file that comes with montessori.

    `seeds` hold instructions. `reference_rows`: rows of `reference`, from its start, that influence is
    measured on; null for all. Without `evaluation` the rows of `reference` after them are held out for
    evaluation; `evaluation_rows` bounds those.
    """

    seeds: str
    reference: str
    evaluation: str | None = None
    reference_rows: int | None = Field(default=256, ge=1)
    evaluation_rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluation is None and self.reference_rows is None:
            raise ValueError("no row is left to evaluate on: give data.evaluation, or a number as reference_rows")
        return self


class Config(Section):
    """One run: who teaches whom, on what, and how each stage works.

    `teacher_mode` "untuned" skips everything that tunes the teacher (Self-Instruct). `optimise` says what
    the teacher is tuned to write better: instructions, or responses.
    """

    # What torch's and numpy's generators both take.
    seed: int = Field(default=42, ge=0, lt=2**32)
    rounds: int = Field(default=1, ge=1)
    teacher: str
    student: str
    teacher_mode: Literal["tuned", "untuned"] = "tuned"
    optimise: Literal["instruction", "response"] = "instruction"
    data: DataSettings
    engine: EngineSettings = EngineSettings()
    generate: GenerateSettings = GenerateSettings()
    responses: ResponseSettings = ResponseSettings()
    split: SplitSettings = SplitSettings()
    warmup: WarmupSettings = WarmupSettings()
    score: ScoreSettings = ScoreSettings()
    signal: SignalSettings = SignalSettings()
    judge: JudgeSettings | None = None
    pairs: PairSettings = PairSettings()
    tune: TuneSettings = TuneSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_audit(self.score.audit)
        except ArgumentError as error:
            raise ValueError(f"score.audit: {error}") from error
        if self.teacher_mode == "tuned":
            self._check_tuned()
        elif self.rounds > 1:
            raise ValueError("rounds: expected 1 with teacher_mode=untuned, whose rounds would all be the same")
        answers = self.evaluate.answers
        if self.engine.name == "endpoint" and (answers.count or answers.questions):
            raise ValueError(
                "evaluate.answers: the student cannot answer through engine.name=endpoint: use another engine"
            )
        return self

    def _check_tuned(self) -> None:
        siblings = self.responses.samples if self.optimise == "response" else self.generate.samples_per_prompt
        key = "responses.samples" if self.optimise == "response" else "generate.samples_per_prompt"
        if siblings < 2:
            raise ValueError(f"{key}={siblings}: expected 2 or more, a preference needs siblings")
        if self.optimise == "instruction" and self.responses.samples > 1:
            raise ValueError(f"responses.samples={self.responses.samples}: expected 1 with optimise=instruction")
        if self.signal.kind == "judge" and self.judge is None:
            raise ValueError("signal.kind=judge: expected judge.model as well")
        if self.engine.name == "endpoint":
            raise ValueError("engine.name=endpoint: a server's model cannot be tuned: use another engine, or untuned")


def read_config(path: str | Path | None = None, preset: str | None = None, assignments: Sequence[str] = ()) -> Config:
    """The config of a preset, with the values of a YAML file over it and `key.sub=value` over both.

    Raises ArgumentError naming the key that is unknown, of the wrong type, or at odds with another.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ArgumentError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
        values = preset_values(preset)
    if path is not None:
        values = _merge(values, _read_yaml(Path(path)))
    for assignment in assignments:
        values = _merge(values, _parse_assignment(assignment))
    alone = f"--set without a CONFIG file or --preset ({', '.join(PRESETS)})"
    return Config.read(values, str(path or f"preset {preset}" if path or preset else alone))


def preset_values(name: str) -> dict[str, Any]:
    """What one of PRESETS sets."""
    return _read_yaml(Path(str(importlib.resources.files(__package__) / f"{name}.yaml")))


def write_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `read_config` reads back to the same config."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def data_path(name: str) -> str:
    """`name`, or the file that comes with montessori where it says so."""
    return str(demo_file(name.removeprefix(_PACKAGED))) if name.startswith(_PACKAGED) else name


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them (5e-6), without dates, and each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge")]
        names = [key.value for key in keys]
        twice = next((name for position, name in enumerate(names) if name in names[:position]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:timestamp",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: expected YAML ({one_line(error)})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ArgumentError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def _parse_assignment(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ArgumentError(f"--set {assignment}: expected key=value, such as pairs.rule=centred")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ArgumentError(f"--set {assignment}: expected a YAML value ({one_line(error)})") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged
