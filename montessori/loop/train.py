"""The final student: its base weights, trained on what the teacher wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from montessori.encoding import encode_rows
from montessori.loop.fit import FitSettings, finish, finished, fit_examples
from montessori.loop.rows import check_learnable, length_limit, student_rows
from montessori.loop.section import ChatSection
from montessori.models import load_model
from montessori.training import check_float32

STUDENT = "student"


class TrainSettings(FitSettings, ChatSection):
    """How the final student is trained, from its base; longer examples are cut at `max_length`."""


def run(
    settings: TrainSettings, student: str | os.PathLike[str], data: Path, out: Path, *, seed: int, progress: bool = True
) -> dict[str, Any]:
    """Train `student` on the instructions and responses of the file `data`; write `out/student`,
    `out/metrics.jsonl` and `out/summary.json`.

    `student` names the weights to start from: the base, not the warmed-up one. Returns counts: examples,
    those cut at `max_length`, those left out without a token to learn, and the tokens of all epochs. Killed
    and called again it goes on from its last checkpoint. On several processes every process calls it.
    """
    if (before := finished(out / STUDENT)) is not None:
        return before
    rows = student_rows(data)
    model, tokenizer = load_model(student)
    check_float32(model)
    encoded = encode_rows(
        rows,
        tokenizer,
        max_length=length_limit(model, settings.max_length, "train"),
        truncation="right",
        **settings.chat,
    )
    check_learnable(encoded, data, "train")
    metrics = fit_examples(settings, model, tokenizer, encoded.examples, out, seed, progress)
    summary = {
        "num_examples": len(encoded.examples),
        "num_truncated": len(encoded.truncated),
        "num_skipped": len(encoded.skipped),
        "tokens": settings.tokens(len(encoded.examples), sum(example.num_tokens for example in encoded.examples)),
    }
    finish(model, tokenizer, out / STUDENT, metrics, summary)
    return summary
