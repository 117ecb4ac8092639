"""What can be known to fail a later stage, found before the first one starts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from montessori import ops
from montessori.data import Rows, load_rows
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError, ModelError
from montessori.fingerprint import check_outside
from montessori.loop import prompts
from montessori.loop.answers import read_mt_bench
from montessori.loop.config import Config
from montessori.loop.engines import check_room, context_length, leaves_room, open_engine
from montessori.loop.fit import FitSettings, check_reports
from montessori.loop.heldout import encode_heldout
from montessori.loop.judge import JudgeSettings
from montessori.loop.prompts import Asked, instruction_text, user_turns
from montessori.loop.warmup import WarmupSettings
from montessori.models import check_checkpoint, checkpoint_name, load_tokenizer
from montessori.options import default_max_length, resolve_device
from montessori.templates import NO_TEMPLATE, Template
from montessori.training import check_batch_size, check_max_steps, count_devices
from montessori.wording import one_line


def check_config(config: Config) -> None:
    """Raise ModelError, DataError or ArgumentError for what a later stage would look for in vain.

    Checkpoints that are paths, chat templates of the models that read or write chats, devices, the backend,
    the judge's engine, batch sizes that the devices cannot share, numbers of steps, trackers of experiments.
    """
    judge = None if config.judge is None else config.judge.model
    for name in (config.teacher, config.student, judge, config.evaluate.answers.opponent):
        if name is not None:
            check_checkpoint(name)
    resolve_device(config.score.device, "score.device")
    resolve_device(config.engine.device, "engine.device")
    ops.check_impl(config.score.backend, "score.backend")
    for sampling in (config.generate.sampling, config.responses.sampling, config.evaluate.answers.sampling):
        check_room(config.engine, sampling, "engine")
    if config.judge is not None and _is_judged(config):
        _check_judge(config.judge)
    for key, section in _trained(config):
        try:
            check_max_steps(section.max_steps)
            check_batch_size(section.batch_size, section.per_device_train_batch_size, count_devices())
            if isinstance(section, FitSettings):
                check_reports(section.report_to)
        except ArgumentError as error:
            raise ArgumentError(f"{key}.{error}") from error
    tokenizer = cache(_tokenizer)
    for key, name, chat in _chats(config):
        loaded, reads = tokenizer(name), key in ("warmup", "score", "train")
        # Texts that are read do without a template; a question is rendered.
        if loaded is None or (chat["chat_template"] == NO_TEMPLATE and reads):
            continue
        try:
            _try_template(loaded, chat, reads)
        except (ArgumentError, DataError) as error:
            raise type(error)(f"{key}.chat_template, {name}: {error}") from error
    for name in (config.teacher, config.student):
        loaded = tokenizer(name)
        if loaded is not None and loaded.pad_token is None and loaded.eos_token is None:
            raise ModelError(f"{name}: its tokenizer has neither pad_token nor eos_token to train with: set one")


def _is_judged(config: Config) -> bool:
    # Answers to questions are written for others to judge.
    return config.signal.kind == "judge" or config.evaluate.answers.count > 0


def _check_judge(judge: JudgeSettings) -> None:
    resolve_device(judge.engine.device, "judge.engine.device")
    try:
        open_engine(judge.engine)
    except ModelError as error:
        raise ModelError(f"judge.{error}") from error
    check_room(judge.engine, judge.sampling, "judge.engine")


def check_place(path: Path, config: Config) -> None:
    """Raise ArgumentError when the run directory `path` lies in a checkpoint or data folder that the run reads."""
    data = config.data
    read = {"teacher": config.teacher, "student": config.student, "data.seeds": data.seeds}
    check_outside(path, "--out", {**read, "data.reference": data.reference, "data.evaluation": data.evaluation})


def check_rows(config: Config, reference: Rows, evaluation: Rows) -> None:
    """Raise DataError for a reference or evaluation row that the student's template, or its context, cannot take."""
    # The limits of an adapter's student are those of a base that only loading it would find.
    if (Path(config.student).expanduser() / "adapter_config.json").is_file():
        return
    tokenizer, own = _tokenizer(config.student), _config(config.student)
    encode_heldout(evaluation, own, tokenizer, max_length=config.score.max_length, **config.score.chat)
    if config.teacher_mode == "tuned":
        limit = config.score.max_length or default_max_length(own)
        encode_rows(reference, tokenizer, max_length=limit, truncation="right", **config.score.chat)
    answers = config.evaluate.answers
    limit = context_length(own.get_text_config(), config.engine.max_length)
    asked = evaluation.part(0, answers.count)
    questions = [
        (f"{asked.where(index)}: the instruction", "remove the row, or lower evaluate.answers.count", text)
        for index, text in enumerate(instruction_text(asked))
    ]
    if answers.questions is not None:
        more = load_rows(answers.questions, name="questions")
        turns = read_mt_bench(more)
        questions += [
            (f"{more.where(index)}: the question", "remove it", texts[0]) for index, texts in enumerate(turns)
        ]
    for what, advice, question in questions:
        if not leaves_room(tokenizer, prompts.ask(tokenizer, question, **answers.chat), limit):
            raise DataError(f"{what} leaves no room for an answer within {limit} tokens: {advice}")


def check_apart(evaluation: Rows, reference: Rows, leakage: str) -> None:
    """Raise DataError when evaluation rows ask what reference rows ask, which the teacher is tuned for, unless allowed:
    in other columns they are the same rows."""
    known = Asked(user_turns(reference))
    shared = [index for index, turns in enumerate(user_turns(evaluation)) if known.has_one_of(turns)]
    if shared and leakage == "refuse":
        raise DataError(
            f"{evaluation.where(shared[0])}: {len(shared)} of {len(evaluation)} evaluation rows have an instruction of "
            "the reference, which the teacher is tuned for: use other rows, or set split.leakage=allow"
        )


def _chats(config: Config) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Section, checkpoint, and template with its variables, of every use of a chat template in this run."""
    if config.generate.style == "chat":
        yield "generate", config.teacher, config.generate.chat
    yield "responses", config.teacher, config.responses.chat
    if config.teacher_mode == "tuned":
        yield "warmup", config.student, config.warmup.chat
    # The held-out losses are read by it in every run.
    yield "score", config.student, config.score.chat
    yield "train", config.student, config.train.chat
    answers = config.evaluate.answers
    if answers.count or answers.questions:
        yield "evaluate.answers", config.student, answers.chat
    if answers.count and answers.opponent is not None:
        yield "evaluate.answers", answers.opponent, answers.chat
    if config.judge is not None and _is_judged(config):
        yield "judge", config.judge.model, config.judge.chat


def _try_template(tokenizer: Any, chat: dict[str, Any], answered: bool) -> None:
    """Render a question, with its answer or for one, as later stages will; errors as `Template.text`."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    asked = messages if answered else messages[:1]
    Template.of(tokenizer, **chat).text(asked, "a question of one word", add_generation_prompt=not answered)


def _trained(config: Config) -> Iterator[tuple[str, WarmupSettings | FitSettings]]:
    """Section of every training of this run, with its name."""
    if config.teacher_mode == "tuned":
        yield "warmup", config.warmup
        yield "tune", config.tune
    yield "train", config.train


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint_name(name), trust_remote_code=False)
    # The files, the hub client and the configuration raise errors of any class.
    except Exception as error:
        raise ModelError(f"{name}: no model config can be loaded ({one_line(error)})") from error


def _tokenizer(name: str) -> Any:
    """The tokenizer of a checkpoint; None for an adapter without one, which has that of a model it names."""
    directory = Path(name).expanduser()
    if (directory / "adapter_config.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(str(directory) if directory.is_dir() else checkpoint_name(name))
