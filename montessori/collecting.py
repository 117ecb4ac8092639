"""From the records of batches to the scores of all rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from montessori.encoding import Encoded
from montessori.options import Options
from montessori.scores import OK, Scores

NON_FINITE = "non_finite"


def collect(
    encoded: Encoded,
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    method: str,
    options: Options,
    names: tuple[str, ...],
    named: bool,
) -> Scores:
    """Scores of the rows of `encoded`, in their order: from what was found for each batch, and for all of them.

    A row that was skipped, or whose score or loss is not finite, has NaN and its reason in `status`. `named` says
    that sets of the reference have names of their own: then there is a column for each.
    """
    size, sets = encoded.num_rows, len(names)
    influence = np.full((size, sets), np.nan)
    loss, variance = np.full(size, np.nan), np.full((size, sets), np.nan)
    status = np.full(size, OK, dtype=object)
    tokens = np.zeros((2, size), dtype=np.int64)
    for example in encoded.examples:
        tokens[:, example.index] = example.num_tokens, example.num_label_tokens
    for row, reason in encoded.skipped.items():
        status[row] = reason
    for record in records:
        influence[record["index"]] = -np.array(record["delta"], dtype=np.float64)
        loss[record["index"]] = record["loss"]
        variance[record["index"]] = record.get("variance", np.nan)
    broken = (status == OK) & ~(np.isfinite(influence).all(axis=1) & np.isfinite(loss))
    status[broken], influence[broken] = NON_FINITE, np.nan
    if not np.isfinite(summary["drift"]).all():
        warnings.warn(
            "the step without a gradient is not finite (eps=0 where exp_avg_sq is 0, or a step that diverges): drift "
            "and centred influence are NaN",
            UserWarning,
            stacklevel=4,
        )
    shape = (size, sets) if named else (size,)
    return Scores(
        influence=influence.reshape(shape),
        drift=_per_set(summary["drift"], named),
        loss=loss,
        num_tokens=tokens[0],
        num_label_tokens=tokens[1],
        status=status,
        reference_loss=_per_set(summary["reference_loss"], named),
        names=names,
        method=method,
        standard_error=np.sqrt(variance).reshape(shape) if options.sample < 1 and method != "exact" else None,
        info={
            **asdict(options),
            "curvature": summary["curvature"],
            "truncated": encoded.truncated,
            "invalid": {str(row): reason for row, reason in encoded.reasons.items()},
            "columns": encoded.columns.to_dict(),
        },
    )


def _per_set(values: Sequence[float], named: bool) -> float | np.ndarray:
    return np.array(values) if named else float(values[0])
