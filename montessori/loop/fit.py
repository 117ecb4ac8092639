"""Training runs that can be killed: the schedule, the arguments of Trainer, checkpoints and what is kept.

Used by `tune` (the teacher) and `train` (the student). Every rank calls the same functions; files are
written by the first.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from safetensors import SafetensorError
from typing_extensions import Self

from montessori import processes
from montessori.batching import Example
from montessori.errors import ArgumentError, ModelError, ResourceError
from montessori.loop.section import Section
from montessori.models import copy_processor
from montessori.oracle import is_finite
from montessori.training import (
    EXAMPLE_COLUMNS,
    check_batch_size,
    count_steps,
    example_trainer,
    last_complete,
    plan_batches,
    shared_arguments,
    tokens_trained,
    train,
)
from montessori.writing import read_json, write_json, write_jsonl

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
CURVES = "runs"  # as TensorBoard's callback names it

_LOGS_PER_RUN = 50
# Timings differ from run to run, sums and means over a run between one that was resumed and one that was not.
_UNSTABLE = re.compile(r"train_.*|.*_runtime|.*_per_second|total_flos|(eval_)?num_tokens")


class FitSettings(Section):
    """How weights are trained: AdamW on float32 weights, warmup-stable-decay.

    The learning rate rises from `min_learning_rate` over the first `warmup_fraction` of the steps, stays
    at `learning_rate`, and falls linearly over the last `decay_fraction`. One step sees `batch_size`
    examples, `per_device_train_batch_size` at a time on each process. `max_steps` > 0 takes the place of
    `num_train_epochs`. `max_grad_norm`: gradients are clipped to this norm, null for not at all. `max_length`:
    tokens of an example, by default 2048 or the model's own limit. `bf16` computes in bfloat16 with float32 weights;
    `gradient_checkpointing` takes less memory and more time; `report_to` as of Trainer (wandb, tensorboard).
    """

    learning_rate: float = Field(default=5e-6, gt=0)
    min_learning_rate: float = Field(default=1e-9, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    decay_fraction: float = Field(default=0.4, ge=0, le=1)
    batch_size: int = Field(default=32, ge=1)
    per_device_train_batch_size: int = Field(default=4, ge=1)
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = -1
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    max_length: int | None = Field(default=None, ge=1)
    bf16: bool = False
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        check_batch_size(self.batch_size, self.per_device_train_batch_size)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate:g}: expected at most learning_rate={self.learning_rate:g}"
            )
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction:g} and decay_fraction={self.decay_fraction:g}: expected at "
                "most 1 together"
            )
        return self

    def steps(self, num_examples: int) -> int:
        """Optimizer steps of a run on so many examples."""
        return count_steps(num_examples, self.batch_size, self.num_train_epochs, self.max_steps)

    def tokens(self, num_examples: int, tokens: int) -> int:
        """Tokens that a run trains on, of so many examples with `tokens` in all."""
        return tokens_trained(tokens, num_examples, self.batch_size, self.steps(num_examples))


def check_reports(names: Sequence[str]) -> None:
    """Raise ArgumentError for a tracker of experiments that transformers does not know or that is not installed."""
    if set(names) <= {"none", "all"}:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ArgumentError(f"report_to={name}: expected some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name not in installed:
            raise ArgumentError(f"report_to={name}: it is not installed: pip install {name}")


def training_arguments(
    settings: FitSettings, kind: type, out: Path, num_examples: int, seed: int, progress: bool, **more: Any
) -> Any:
    """Arguments of class `kind` (TrainingArguments or one derived from it) for a run on `num_examples`.

    Raises ArgumentError when the batch size does not divide over the processes.
    """
    options: dict[str, Any] = {
        "output_dir": str(out / CHECKPOINTS),
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_train_batch_size,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "weight_decay": settings.weight_decay,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_strategy": "steps",
        "logging_first_step": True,
        "report_to": list(settings.report_to) or "none",
        **shared_arguments(settings.max_grad_norm, seed, progress),
        **more,
    }
    with warnings.catch_warnings():
        # The older of two names, which all supported versions know.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
        arguments = kind(**options)
    _plan(arguments, settings, num_examples)
    return arguments


def _plan(arguments: Any, settings: FitSettings, num_examples: int) -> None:
    from transformers import SchedulerType

    total = settings.steps(num_examples)
    plan_batches(arguments, settings.batch_size, total)
    arguments.warmup_steps = int(settings.warmup_fraction * total)
    arguments.lr_scheduler_type = SchedulerType.WARMUP_STABLE_DECAY
    arguments.lr_scheduler_kwargs = {
        "num_decay_steps": int(settings.decay_fraction * total),
        "decay_type": "linear",
        "min_lr_ratio": settings.min_learning_rate / settings.learning_rate,
    }
    arguments.logging_steps = math.ceil(total / _LOGS_PER_RUN)


def fit_examples(
    settings: FitSettings, model: Any, tokenizer: Any, examples: Sequence[Example], out: Path, seed: int, progress: bool
) -> list[dict[str, Any]]:
    """Train `model` in place on the labelled tokens of `examples`; return the metrics of every logged step."""
    from transformers import TrainingArguments

    arguments = training_arguments(settings, TrainingArguments, out, len(examples), seed, progress, **EXAMPLE_COLUMNS)
    trainer = example_trainer(model, tokenizer, examples, arguments)
    run_trainer(trainer, out)
    return metrics_of(trainer)


def run_trainer(trainer: Any, out: Path) -> None:
    """Train to the end, from the last complete checkpoint below `out` where there is one."""
    start = last_complete(out / CHECKPOINTS) if processes.is_main() else None
    train(trainer, processes.from_main(start))


def metrics_of(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, one dict per logged step with sorted keys; the same bytes for the same run."""
    logged = [
        {key: entry[key] for key in sorted(entry) if not _UNSTABLE.fullmatch(key)}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in logged if entry.keys() - {"epoch", "step"}]


def finish(
    model: Any, tokenizer: Any, target: Path, metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Save `target`, a plain checkpoint directory, with metrics and summary beside it; drop the checkpoints.

    Every rank calls it; the first writes. Raises ModelError where training has led to weights that are not finite,
    ResourceError when the disk is full.
    """
    out = target.parent
    _check_weights(model, target)
    if processes.is_main():
        save_model(model, tokenizer, target)
        write_jsonl(out / METRICS_FILE, [dict(entry) for entry in metrics])
        write_json(out / SUMMARY_FILE, summary)
        # Last, so that a run killed before goes on from them.
        _drop_checkpoints(out)
    processes.wait_for_all()


def _check_weights(model: Any, target: Path) -> None:
    wrong = [name for name, parameter in model.named_parameters() if not is_finite(parameter.detach())]
    if wrong:
        raise ModelError(
            f"{target}: training has led to weights that are not finite, such as {wrong[0]}: lower learning_rate, or "
            "set max_grad_norm"
        )


def _drop_checkpoints(out: Path) -> None:
    """Delete the checkpoints of Trainer; the curves that a tracker has put beside them stay, in `out`/runs."""
    curves = out / CHECKPOINTS / CURVES
    if curves.is_dir():
        shutil.copytree(curves, out / CURVES, dirs_exist_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def finished(target: Path) -> dict[str, Any] | None:
    """The summary that `finish` wrote beside `target`, None where it did not come so far; drops what it left."""
    out = target.parent
    file = out / SUMMARY_FILE
    summary = read_json(file) if file.is_file() else None
    summary = processes.from_main(summary)
    if summary is not None and processes.is_main():
        _drop_checkpoints(out)
    return summary


def save_model(model: Any, tokenizer: Any, target: Path) -> None:
    """Write a checkpoint directory, whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        copy_processor(model, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    # safetensors has an error of its own for a failed write.
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(f"{target}: cannot be written ({error}): is the disk full?") from error
