"""What every run of Trainer in this package shares: rows of examples, padding, and what a killed run left."""

from __future__ import annotations

import copy
import errno
import json
import math
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import Dataset

from montessori import processes
from montessori.batching import IGNORE_INDEX, Example
from montessori.checkpoints import list_checkpoints, step_of
from montessori.errors import ArgumentError, ModelError, ResourceError
from montessori.models import load_model
from montessori.wording import one_line

# What TrainingArguments need for an `example_trainer`.
EXAMPLE_COLUMNS: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}

_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
_SAVES_PER_RUN = 4
_FAILED_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def check_batch_size(batch_size: int, per_device_train_batch_size: int, devices: int = 1) -> None:
    """Raise ArgumentError unless `devices`, so many examples each, can share the examples of a step."""
    at_once = per_device_train_batch_size * devices
    if batch_size % at_once:
        expected = f"a multiple of per_device_train_batch_size={per_device_train_batch_size}"
        if devices > 1:
            expected = (
                f"a multiple of {at_once}, per_device_train_batch_size={per_device_train_batch_size} on each of "
                f"{devices} devices"
            )
        raise ArgumentError(f"batch_size={batch_size}: expected {expected}")


def check_max_steps(max_steps: int) -> None:
    """Raise ArgumentError for what is neither a number of steps nor -1, which stands for none given."""
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or (max_steps < 1 and max_steps != -1):
        raise ArgumentError(f"max_steps={max_steps!r}: expected at least 1, or -1 for as many as the epochs have")


def accumulation_steps(arguments: Any, batch_size: int) -> int:
    """Batches of TrainingArguments that make one step of `batch_size`; ArgumentError if no number of them does."""
    # With several GPUs in one process, Trainer splits a larger batch over them.
    at_once = arguments.train_batch_size * arguments.world_size
    per_device = arguments.per_device_train_batch_size
    check_batch_size(batch_size, per_device, at_once // per_device)
    return batch_size // at_once


def count_devices() -> int:
    """How many devices share a step: one of each of several processes, or the GPUs of a single one."""
    return processes.world_size() if processes.world_size() > 1 else max(torch.cuda.device_count(), 1)


def count_steps(num_examples: int, batch_size: int, num_train_epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run; `max_steps` > 0 takes the place of `num_train_epochs`."""
    return max_steps if max_steps > 0 else math.ceil(num_train_epochs * math.ceil(num_examples / batch_size))


def tokens_trained(tokens: int, num_examples: int, batch_size: int, steps: int) -> int:
    """Tokens that `steps` train on where an epoch has `tokens`: those of a part of one by its share of the steps."""
    return round(tokens * steps / math.ceil(num_examples / batch_size))


def check_float32(model: nn.Module) -> None:
    """Raise ModelError unless all trainable weights are float32: a step of 1e-6 is lost in 16 bits."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(
                f"{name}: expected trainable weights in float32, got {parameter.dtype}: "
                "load the model with dtype=torch.float32"
            )


def shared_arguments(max_grad_norm: float | None, seed: int, progress: bool) -> dict[str, Any]:
    """Arguments of TrainingArguments that all runs have in common."""
    on_gpu = torch.cuda.is_available()
    return {
        # Trainer's word for no clipping is 0.
        "max_grad_norm": max_grad_norm or 0.0,
        "optim": "adamw_torch",
        "seed": seed,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "disable_tqdm": not progress,
    }


def plan_batches(arguments: Any, batch_size: int, total_steps: int) -> None:
    """Set accumulation and saving in `arguments` for a run of `total_steps`, each on `batch_size` examples."""
    arguments.gradient_accumulation_steps = accumulation_steps(arguments, batch_size)
    arguments.save_steps = math.ceil(total_steps / _SAVES_PER_RUN)


class ExampleRows(Dataset):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        example = self.examples[row]
        return {
            "input_ids": example.input_ids.tolist(),
            "attention_mask": [1] * example.num_tokens,
            "labels": example.labels.tolist(),
        }


def example_collator(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    if tokenizer.pad_token is None:
        # Padding is masked out, so any token does; the saved tokenizer stays as it is.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError("tokenizer: expected a pad_token or an eos_token to pad with, got neither: set one")
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)


def example_trainer(model: Any, tokenizer: Any, examples: Sequence[Example], arguments: Any) -> Any:
    """A Trainer on the labelled tokens of `examples`; `arguments` need EXAMPLE_COLUMNS."""
    from transformers import Trainer

    return Trainer(
        model=model,
        args=arguments,
        train_dataset=ExampleRows(examples),
        data_collator=example_collator(tokenizer),
        processing_class=tokenizer,
    )


def train(trainer: Any, start: Path | None) -> None:
    """Run `trainer` from the checkpoint `start`, if any. Raises ResourceError when it cannot save what it should."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    with _saving(Path(trainer.args.output_dir)):
        trainer.train(resume_from_checkpoint=None if start is None else str(start))


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_failed_write(error):
            raise
        raise ResourceError(f"{path}: cannot be written ({one_line(error)}): is the disk full?") from error


def _is_failed_write(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FAILED_WRITES
    # torch.save and safetensors tell of it by their text alone.
    return "inline_container.cc" in str(error) or (isinstance(error, SafetensorError) and "I/O error" in str(error))


def last_complete(path: Path) -> Path | None:
    """The last checkpoint below `path` that a run can go on from; drops those it cannot."""
    complete = None
    for checkpoint in list_checkpoints(path):
        if is_complete(checkpoint):
            complete = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return complete


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that Trainer goes on from is there to its end."""
    weights = [*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model.safetensors")]
    # One file for a single process, one for each of several.
    random_states = list(checkpoint.glob("rng_state*.pth"))
    if not weights or not random_states or not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    index = checkpoint / "model.safetensors.index.json"
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            weights = [checkpoint / shard for shard in set(shards)]
        for file in weights:
            # Opening compares the lengths in the header with the length of the file.
            with safe_open(file, framework="pt"):
                pass
    except (ValueError, KeyError, OSError, SafetensorError):
        return False
    # A file of torch.save ends with the directory of its zip archive.
    archives = [*random_states, *(checkpoint / name for name in _CHECKPOINT_FILES if not name.endswith(".json"))]
    return state.get("global_step") == step_of(checkpoint) and all(map(zipfile.is_zipfile, archives))


def restore_weights(model: Any, checkpoint: Path) -> None:
    """Put the weights of `checkpoint` into `model`, all of them or an error.

    Trainer does so too when it resumes, but only warns about names that do not match.
    """
    if (checkpoint / "adapter_config.json").is_file():
        missing = model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True).missing_keys
        if missing:
            raise ModelError(f"{checkpoint}: the adapter lacks {missing[0]}: delete the checkpoint")
        return
    saved, _ = load_model(checkpoint)
    model.load_state_dict(saved.state_dict())
