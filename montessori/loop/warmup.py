"""The warm-up stage: a few steps of the student on what the teacher wrote, with its optimizer state kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from montessori import processes
from montessori.checkpoints import list_checkpoints, step_of
from montessori.encoding import encode_rows
from montessori.loop.rows import check_learnable, length_limit, student_rows
from montessori.loop.section import ChatSection
from montessori.models import load_model
from montessori.training import check_batch_size, tokens_trained
from montessori.warmup import warmup
from montessori.writing import read_json, write_json

RESULT_FILE = "result.json"


class WarmupSettings(ChatSection):
    """As in `montessori.warmup`: the learning rate rises from 0 over the whole run. Examples longer than `max_length`
    are cut at the end."""

    learning_rate: float = Field(default=5e-6, gt=0)
    batch_size: int = Field(default=32, ge=1)
    per_device_train_batch_size: int = Field(default=4, ge=1)
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = -1
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    max_length: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_batch_size(self.batch_size, self.per_device_train_batch_size)
        return self


def run(
    settings: WarmupSettings,
    student: str | os.PathLike[str],
    data: Path,
    out: Path,
    *,
    seed: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Warm `student` up on the file `data`; `checkpoint(out)` is then the checkpoint with optimizer state.

    Returns counts of examples, steps and tokens. Killed and called again it goes on from its last checkpoint.
    """
    rows = student_rows(data)
    model, tokenizer = load_model(student)
    training = settings.model_dump(exclude={"max_length", *settings.chat})
    encoded = encode_rows(
        rows,
        tokenizer,
        max_length=length_limit(model, settings.max_length, "warmup"),
        truncation="right",
        **settings.chat,
    )
    check_learnable(encoded, data, "warmup")
    final = warmup(model, tokenizer, encoded.examples, out, seed=seed, progress=progress, **training)
    if processes.is_main():
        for earlier in list_checkpoints(out):
            if earlier != final:
                shutil.rmtree(earlier)
        write_json(out / RESULT_FILE, {"checkpoint": final.name})
    processes.wait_for_all()
    count, tokens = len(encoded.examples), sum(example.num_tokens for example in encoded.examples)
    return {
        "num_examples": count,
        "num_truncated": len(encoded.truncated),
        "steps": step_of(final),
        "tokens": tokens_trained(tokens, count, settings.batch_size, step_of(final)),
    }


def checkpoint(out: Path) -> Path:
    """The checkpoint that a finished warm-up in `out` left."""
    return out / read_json(out / RESULT_FILE)["checkpoint"]
