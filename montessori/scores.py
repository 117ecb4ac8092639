"""The result of scoring: one row per candidate, in input order, and the file it is saved in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from montessori.agreement import Agreement
from montessori.errors import ArgumentError, DataError
from montessori.writing import written_whole

if TYPE_CHECKING:
    import datasets
    import pandas as pd

OK = "ok"
_METADATA_KEY = b"montessori"


@dataclass(frozen=True, eq=False)
class Scores:
    """Influence of N candidates on K reference sets.

    `influence`, `centred`: float64 [N], or [N, K] when the reference is a dict of named sets; positive
    means that the step lowers the reference loss; NaN where `status` is not "ok". `centred` is
    `influence − drift`. `drift`: influence of the step with g = 0, a float or [K]. `loss`: the candidate's
    own mean token loss, float64 [N]. `num_tokens`, `num_label_tokens`: int64 [N]. `status`: str [N], "ok"
    or why there is no score. `reference_loss`: L(θ), a float or [K]. `info`: settings of the run.
    `standard_error`: that of `influence` where only a share of the weights' tiles was scored, else None.
    Two are equal when all of this is, NaN included.
    """

    influence: np.ndarray
    drift: float | np.ndarray
    loss: np.ndarray
    num_tokens: np.ndarray
    num_label_tokens: np.ndarray
    status: np.ndarray
    reference_loss: float | np.ndarray
    names: tuple[str, ...]
    method: str
    info: dict[str, Any] = field(default_factory=dict)
    standard_error: np.ndarray | None = None

    @property
    def centred(self) -> np.ndarray:
        return self.influence - self.drift

    @property
    def ok(self) -> np.ndarray:
        """bool [N]: which candidates have a score."""
        return self.status == OK

    @property
    def skipped(self) -> dict[int, str]:
        """Row number and reason of every candidate without a score."""
        return {int(row): str(self.status[row]) for row in np.flatnonzero(~self.ok)}

    def __len__(self) -> int:
        return len(self.status)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scores) and _same_fields(self, other)

    # The arrays of a frozen dataclass can still be written to.
    __hash__ = None  # type: ignore[assignment]

    def to_table(self) -> pa.Table:
        """Arrow table with one row per candidate and the scalars in the schema's metadata."""
        columns: dict[str, Any] = {"index": np.arange(len(self), dtype=np.int64)}
        quantities = [("influence", self.influence), ("centred", self.centred)]
        if self.standard_error is not None:
            quantities.append(("standard_error", self.standard_error))
        for quantity, values in quantities:
            if values.ndim == 1:
                columns[quantity] = values
            else:
                columns.update({f"{quantity}/{name}": values[:, k] for k, name in enumerate(self.names)})
        columns |= {
            "loss": self.loss,
            "num_tokens": self.num_tokens,
            "num_label_tokens": self.num_label_tokens,
            "status": self.status.astype(object),
        }
        # What is said of single rows is a column: Parquet cannot read metadata back that grew with their number.
        info = {key: value for key, value in self.info.items() if key != "invalid"}
        if info.get("truncated"):
            columns["truncated"] = np.zeros(len(self), dtype=bool)
            columns["truncated"][info.pop("truncated")] = True
        reasons = self.info.get("invalid", {})
        if reasons:
            columns["reason"] = pa.array([reasons.get(str(row)) for row in range(len(self))], pa.string())
        scalars = {
            "drift": np.asarray(self.drift).tolist(),
            "reference_loss": np.asarray(self.reference_loss).tolist(),
            "names": list(self.names),
            "method": self.method,
            "info": info,
        }
        table = pa.table(columns)
        return table.replace_schema_metadata({_METADATA_KEY: json.dumps(scalars, sort_keys=True).encode()})

    def to_pandas(self) -> pd.DataFrame:
        return self.to_table().to_pandas()

    def to_dataset(self) -> datasets.Dataset:
        import datasets

        return datasets.Dataset(self.to_table())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a Parquet file, whole or not at all. Raises ResourceError when it cannot be written."""
        path = Path(path).expanduser()
        with written_whole(path) as partial:
            pq.write_table(self.to_table(), partial)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote. Raises DataError for anything else."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise DataError(f"{path}: {'expected a file, got a directory' if path.is_dir() else 'no such file'}")
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        metadata = (table.schema.metadata or {}).get(_METADATA_KEY)
        if metadata is None:
            raise DataError(f"{path}: not written by montessori score (no montessori metadata in the file)")
        try:
            return cls._of_table(table, json.loads(metadata))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected the columns and metadata that montessori score writes, got others ({error!r})"
            ) from error

    @classmethod
    def _of_table(cls, table: pa.Table, scalars: dict[str, Any]) -> Scores:
        names = tuple(scalars["names"])
        info = scalars["info"]
        if "reason" in table.column_names:
            found = enumerate(table["reason"].to_pylist())
            info["invalid"] = {str(row): reason for row, reason in found if reason is not None}
        elif "invalid" not in info:
            info["invalid"] = {}
        # Else no row was cut, or an earlier version wrote the numbers of those that were into the metadata.
        if "truncated" in table.column_names:
            info["truncated"] = np.flatnonzero(table["truncated"].to_numpy()).tolist()
        column = {name: table[name].to_numpy() for name in table.column_names}
        several = "influence" not in column

        def quantity(name: str) -> np.ndarray:
            return np.stack([column[f"{name}/{n}"] for n in names], 1) if several else column[name]

        return cls(
            influence=quantity("influence"),
            drift=np.array(scalars["drift"]) if several else scalars["drift"],
            loss=column["loss"],
            num_tokens=column["num_tokens"],
            num_label_tokens=column["num_label_tokens"],
            status=column["status"].astype(str),
            reference_loss=np.array(scalars["reference_loss"]) if several else scalars["reference_loss"],
            names=names,
            method=scalars["method"],
            info=info,
            standard_error=quantity("standard_error") if any(c.startswith("standard_error") for c in column) else None,
        )


@dataclass(frozen=True, eq=False)
class Audit:
    """Predicted and real influence of a sample of candidates; see `InfluenceEstimator.audit`.

    `index`: int64 [k], row numbers of the sample. `predicted`, `real`: float64 [k, K]. `skipped`: row numbers that the
    sample lost because one of the two is not finite. `agreement`: one
    Agreement per reference set, `centred_agreement` the same after subtracting each side's own drift.
    `pearson`, `spearman`, `sign_agreement`, `median_relative_error` are those of the first set.
    """

    index: np.ndarray
    predicted: np.ndarray
    real: np.ndarray
    agreement: dict[str, Agreement]
    centred_agreement: dict[str, Agreement]
    skipped: tuple[int, ...] = ()

    @classmethod
    def of(cls, predicted: Scores, real: Scores, rows: Sequence[int]) -> Audit:
        """The audit of `rows`, scored in both ways. Raises ArgumentError when fewer than two have finite influence."""
        index = np.array(sorted(rows))
        both = [scores.influence.reshape(len(scores), -1)[index] for scores in (predicted, real)]
        centred = [scores.centred.reshape(len(scores), -1)[index] for scores in (predicted, real)]
        kept = np.isfinite(both[0]).all(axis=1) & np.isfinite(both[1]).all(axis=1)
        if kept.sum() < 2:
            raise ArgumentError(
                f"audit: expected at least 2 candidates with finite influence, got {kept.sum()} of {len(index)}"
            )
        first, second = (
            {name: Agreement.of(a[kept, i], b[kept, i]) for i, name in enumerate(predicted.names)}
            for a, b in (both, centred)
        )
        return cls(index[kept], both[0][kept], both[1][kept], first, second, tuple(index[~kept].tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Audit) and _same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def pearson(self) -> float:
        return self._first.pearson

    @property
    def spearman(self) -> float:
        return self._first.spearman

    @property
    def sign_agreement(self) -> float:
        return self._first.sign_agreement

    @property
    def median_relative_error(self) -> float:
        return self._first.median_relative_error

    @property
    def _first(self) -> Agreement:
        return next(iter(self.agreement.values()))


def _same_fields(a: Scores | Audit, b: Scores | Audit) -> bool:
    return all(_same(getattr(a, entry.name), getattr(b, entry.name)) for entry in fields(a))


def _same(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f")
