"""A short, real AdamW fine-tune that gives the optimizer the moments that scoring needs.

Scores are taken at a student that is already moving, with the optimizer state of the run that moved it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from montessori import processes
from montessori.batching import Example
from montessori.checkpoints import list_checkpoints, step_of
from montessori.errors import ArgumentError, DataError, ResourceError
from montessori.fingerprint import examples_digest
from montessori.holdings import model_digest
from montessori.training import (
    EXAMPLE_COLUMNS,
    check_batch_size,
    check_float32,
    check_max_steps,
    count_steps,
    example_trainer,
    is_complete,
    last_complete,
    plan_batches,
    restore_weights,
    shared_arguments,
    train,
)
from montessori.writing import write_json

RECORD_FILE = "warmup.json"


def warmup(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    output_dir: str | os.PathLike[str],
    *,
    learning_rate: float = 5e-6,
    batch_size: int = 32,
    per_device_train_batch_size: int = 4,
    num_train_epochs: float = 1,
    max_steps: int = -1,
    weight_decay: float = 0.0,
    seed: int = 42,
    resume: bool = True,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> Path:
    """Fine-tune `model` on `examples` with AdamW; return `output_dir/checkpoint-N`, N optimizer steps.

    The checkpoint is an ordinary one of Trainer: model, tokenizer and `optimizer.pt`. One step sees
    `batch_size` examples, `per_device_train_batch_size` of them at a time. The learning rate rises
    linearly over the whole run, from 0 at the first step, so that `optimizer.pt` holds `learning_rate`.
    `max_steps`, unless -1, takes the place of `num_train_epochs`. Without `max_grad_norm` gradients are not
    clipped; give scoring the same value, or its steps are not those of this run.

    `model` is trained in place, holds the weights of the returned checkpoint afterwards, and keeps
    its training or eval mode; it moves to the GPU where there is one. Random generators are seeded
    with `seed`.

    A run that was cut short goes on from its last complete checkpoint when called again with the same
    arguments and starting weights, and a finished one returns at once. With `resume=False`,
    `output_dir` must not hold a run. Under torchrun every process calls this; they share a step's examples.

    Raises DataError without examples, ModelError unless trainable weights are float32, ArgumentError
    for batch sizes that do not divide, for numbers that no run can have and for an `output_dir` that holds another
    run, ResourceError when it cannot be written.
    """
    path = Path(output_dir)
    if not examples:
        raise DataError("examples: expected at least one example to warm up on, got none")
    check_training(
        learning_rate=learning_rate,
        batch_size=batch_size,
        per_device_train_batch_size=per_device_train_batch_size,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
    )
    check_float32(model)
    settings: dict[str, Any] = {
        "learning_rate": learning_rate,
        "per_device_train_batch_size": per_device_train_batch_size,
        "num_train_epochs": num_train_epochs,
        "max_steps": max_steps,
        "weight_decay": weight_decay,
    }
    shared = shared_arguments(max_grad_norm, seed, progress)
    arguments = _training_arguments(path, settings | shared)
    total_steps = _plan_steps(arguments, len(examples), batch_size)
    settings |= {"seed": seed, "max_grad_norm": shared["max_grad_norm"]}
    settings |= {"batch_size": batch_size, "examples": examples_digest(examples)}
    with _writing(path):
        start = processes.from_main(_claim(path, settings, model, resume) if processes.is_main() else None)
    if start is not None:
        restore_weights(model, start)
        if step_of(start) == total_steps:
            return start
    _train(model, tokenizer, examples, arguments, start)
    return _finish(path, model, total_steps)


def check_training(
    *,
    learning_rate: float,
    batch_size: int,
    per_device_train_batch_size: int,
    num_train_epochs: float,
    max_steps: int,
    weight_decay: float,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    """Raise ArgumentError for numbers that no warm-up can have."""
    for name, value in (("batch_size", batch_size), ("per_device_train_batch_size", per_device_train_batch_size)):
        if value < 1:
            raise ArgumentError(f"{name}={value}: expected a positive number of examples")
    check_batch_size(batch_size, per_device_train_batch_size)
    check_max_steps(max_steps)
    positive = {"learning_rate": learning_rate, "max_grad_norm": max_grad_norm}
    if max_steps == -1:
        positive["num_train_epochs"] = num_train_epochs
    for name, number in positive.items():
        # The largest that torch's float32 arithmetic can hold is beyond any use.
        if number is not None and not 0 < number < 1e30:
            raise ArgumentError(f"{name}={number}: expected a positive number")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ArgumentError(f"weight_decay={weight_decay}: expected 0 or a positive number")
    # What torch's and numpy's generators both take.
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"seed={seed}: expected a number from 0 to {2**32 - 1}")


def _training_arguments(path: Path, options: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(path),
        lr_scheduler_type="constant_with_warmup",
        logging_strategy="no" if options["disable_tqdm"] else "steps",
        report_to=[],
        **EXAMPLE_COLUMNS,
        **options,
    )


def _plan_steps(arguments: Any, num_examples: int, batch_size: int) -> int:
    """Set accumulation, warm-up and saving in `arguments`; return the optimizer steps of the whole run."""
    total_steps = count_steps(num_examples, batch_size, arguments.num_train_epochs, arguments.max_steps)
    plan_batches(arguments, batch_size, total_steps)
    arguments.warmup_steps, arguments.logging_steps = total_steps, arguments.save_steps
    return total_steps


def _claim(path: Path, settings: dict, model: nn.Module, resume: bool) -> Path | None:
    """Make `path` the directory of this run; return the checkpoint to go on from, None to start."""
    record_file = path / RECORD_FILE
    weights = model_digest(model)
    if not record_file.exists():
        if list_checkpoints(path):
            raise ArgumentError(f"output_dir {path}: holds checkpoints of another run: choose another directory")
        write_json(path / RECORD_FILE, {"settings": settings, "weights": [weights]})
        return None
    if not resume:
        raise ArgumentError(f"output_dir {path}: holds a run: expected none with resume=False: delete it")
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        changed = [key for key, value in settings.items() if record["settings"].get(key) != value]
        if weights not in record["weights"]:
            changed.append("the weights of model")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{record_file}: expected the record of a warm-up ({error!r}): choose another directory"
        ) from error
    if changed:
        raise ArgumentError(
            f"output_dir {path}: holds a run with other {', '.join(changed)}: use those, or another directory"
        )
    return last_complete(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"output_dir {path}: cannot be written ({error.strerror or error})") from error


def _train(model: Any, tokenizer: Any, examples: Sequence[Example], arguments: Any, start: Path | None) -> None:
    was_training, use_cache = model.training, getattr(model.config, "use_cache", None)
    trainer = example_trainer(model, tokenizer, examples, arguments)
    try:
        train(trainer, start)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        model.config.use_cache = use_cache


def _finish(path: Path, model: nn.Module, total_steps: int) -> Path:
    final = path / f"checkpoint-{total_steps}"
    if processes.is_main():
        if not is_complete(final):
            raise ResourceError(f"{final}: expected a complete checkpoint after {total_steps} steps: is the disk full?")
        with _writing(path):
            record = json.loads((path / RECORD_FILE).read_text(encoding="utf-8"))
            write_json(path / RECORD_FILE, {**record, "weights": [*record["weights"], model_digest(model)]})
    processes.wait_for_all()
    return final
