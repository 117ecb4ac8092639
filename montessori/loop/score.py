"""The score stage: influence of every probing example on the reference set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from montessori import processes
from montessori.data import Rows
from montessori.errors import ArgumentError, DataError, ResourceError
from montessori.estimator import InfluenceEstimator
from montessori.journal import ScoreJournal
from montessori.loop.inputs import text_digest
from montessori.loop.rows import length_limit, student_rows
from montessori.loop.section import ChatSection
from montessori.models import load_model
from montessori.options import check_method, resolve_device
from montessori.runs import DTYPES, audit_record
from montessori.writing import read_json, write_json

SCORES_FILE = "scores.parquet"
AUDIT_FILE = "audit.json"
CANDIDATES_FILE = "candidates.json"


class ScoreSettings(ChatSection):
    """As in `InfluenceEstimator` and the options of `montessori score`.

    `method`, `backend`, `pilot`, `reference_weighting`, `sample`, `reference_dtype`: how influence is computed.
    `batch_tokens`, `reference_batch_tokens`: padded tokens of a batch. `dtype`: of the weights. Longer rows are
    cut at `max_length`. `audit`: so many rows are compared with real float32 steps. Gradients are clipped as in the
    warm-up (`warmup.max_grad_norm`).
    """

    method: Literal["anchored", "first_order", "exact"] = "anchored"
    backend: str = "auto"
    batch_tokens: int = Field(default=4096, ge=1)
    pilot: int = Field(default=8, ge=0)
    reference_weighting: Literal["example_mean", "token_mean"] = "example_mean"
    max_length: int | None = Field(default=None, ge=1)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    sample: float = Field(default=1.0, gt=0, le=1)
    reference_dtype: Literal["float32", "model"] = "float32"
    reference_batch_tokens: int = Field(default=4096, ge=1)
    audit: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_method(self.method, self.sample, self.reference_dtype, self.backend)
        if self.max_length is not None and self.batch_tokens < self.max_length:
            raise ArgumentError(f"batch_tokens={self.batch_tokens}: expected at least max_length={self.max_length}")
        return self


def open_estimator(
    settings: ScoreSettings, checkpoint: Path, reference: Rows, max_grad_norm: float | None
) -> InfluenceEstimator:
    """The estimator at the warmed-up student `checkpoint`; gradients clipped as in its warm-up."""
    model, tokenizer = load_model(checkpoint, dtype=DTYPES[settings.dtype])
    return InfluenceEstimator(
        model.to(resolve_device(settings.device, "score.device")),
        checkpoint,
        reference,
        settings.method,
        settings.backend,
        tokenizer=tokenizer,
        max_length=length_limit(model, settings.max_length, "score"),
        truncation="right",
        **settings.chat,
        pilot=settings.pilot,
        max_grad_norm=max_grad_norm,
        sample=settings.sample,
        reference_weighting=settings.reference_weighting,
        reference_dtype=settings.reference_dtype,
        reference_batch_tokens=settings.reference_batch_tokens,
    )


def check_candidates(data: Path, scored: Path) -> None:
    """Raise DataError unless `data` has the rows that were scored in the folder `scored`."""
    if read_json(scored / CANDIDATES_FILE)["digest"] != text_digest(student_rows(data).rows):
        raise DataError(f"{data}: its rows are not those that {scored / SCORES_FILE} is of; score them again")


def run(
    settings: ScoreSettings,
    checkpoint: Path,
    data: Path,
    reference: Rows,
    out: Path,
    *,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the rows of `data`; write `out`/scores.parquet, their digest, and audit.json where an audit is asked for.

    Returns counts of rows, rows without a score, and tokens. Killed and called again it goes on with the
    first unfinished batch. Under torchrun the processes share the rows.
    """
    rows = student_rows(data)
    estimator = open_estimator(settings, checkpoint, reference, max_grad_norm)
    journal = ScoreJournal(out / f"scores.journal.{processes.rank()}.jsonl")
    try:
        scores = estimator.score(
            rows, batch_tokens=settings.batch_tokens, progress=progress, journal=journal, distributed=True
        )
    except ResourceError as error:
        raise ResourceError(f"score, {data}: {error}") from error
    if processes.is_main():
        scores.save(out / SCORES_FILE)
        write_json(out / CANDIDATES_FILE, {"digest": text_digest(rows.rows)})
        if settings.audit:
            write_json(out / AUDIT_FILE, audit_record(estimator.audit(rows, k=settings.audit, progress=progress)))
    processes.wait_for_all()
    journal.remove()
    return {"num_rows": len(scores), "num_unscored": int((~scores.ok).sum()), "tokens": int(scores.num_tokens.sum())}
