"""Rows of candidates and references, as examples that the model can be given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from montessori.batching import Example, with_row
from montessori.data import load_rows
from montessori.encoding import Encoded, encode_rows
from montessori.errors import ArgumentError, DataError
from montessori.files import Rows
from montessori.models import check_token_ids
from montessori.options import Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowReader:
    """Reads rows for one model. With a loss of the user's own, of candidates or of the reference, examples keep their
    rows, and labels are what it takes them for; else they have to be ids of the vocabulary."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    options: Options
    own_loss: bool
    own_reference_loss: bool

    def read(self, source: Any, name: str, may_be_none: bool = False, progress: bool = False) -> Encoded:
        """Candidates; what this has read before is returned as it is. Raises DataError where no row is an example,
        unless there `may_be_none`, or as `load_rows`, `encode_rows` and `check_token_ids` do, and ArgumentError for
        what another estimator has read."""
        if isinstance(source, Encoded):
            if source.reader is not self:
                raise ArgumentError(
                    f"{name}: expected rows or what this estimator has read, got what another one has: another "
                    "tokenizer or other settings would not show; pass the rows"
                )
            return source
        rows = load_rows(source, name=name)
        encoded = self._read(rows, name, self.options.invalid_rows, self.own_loss, may_be_none, progress)
        return replace(encoded, reader=self)

    def _read(
        self,
        rows: Rows,
        name: str,
        invalid_rows: str,
        own_labels: bool,
        may_be_none: bool = False,
        progress: bool = False,
    ) -> Encoded:
        encoded = encode_rows(
            rows,
            self.tokenizer,
            max_length=self.options.max_length,
            truncation=self.options.truncation,
            invalid_rows=invalid_rows,
            chat_template=self.options.chat_template,
            chat_template_kwargs=self.options.chat_template_kwargs,
            name=name,
            progress=progress,
        )
        if not encoded.examples and not may_be_none:
            reasons = sorted(set(encoded.skipped.values()) - {"no_label_tokens"})
            also = f"; others are skipped as {', '.join(reasons)}" if reasons else ""
            raise DataError(f"{rows.source}: no row has a label token that the model could learn from{also}")
        check_token_ids(self.model, encoded.examples, rows, labels=not own_labels)
        if self.own_loss or self.own_reference_loss:
            encoded = replace(encoded, examples=[with_row(one, rows[one.index]) for one in encoded.examples])
        return encoded

    def reference(self, source: Any, name: str) -> list[Example]:
        """Raises DataError for every row that would not count, too."""
        rows = load_rows(source, name=name)
        encoded = self._read(rows, name, "error", self.own_reference_loss)
        if encoded.skipped:
            row, reason = next(iter(encoded.skipped.items()))
            where = rows.where(row)
            raise DataError(f"{where}: {reason}; every row of the reference must count, remove it or shorten it")
        return encoded.examples
