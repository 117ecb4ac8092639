"""Rows of candidates and references, as examples that the model can be given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from montessori.batching import Example
from montessori.data import load_rows
from montessori.encoding import Encoded, encode_rows
from montessori.errors import DataError
from montessori.models import check_token_ids
from montessori.options import Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowReader:
    """Reads rows for one model. `check_labels`: whether labels have to be ids of its vocabulary."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    options: Options
    check_labels: bool

    def read(self, source: Any, name: str, invalid_rows: str | None = None, may_be_none: bool = False) -> Encoded:
        """Raises DataError where no row is an example, unless there `may_be_none`, or as `load_rows`, `encode_rows`
        and `check_token_ids` do."""
        rows = load_rows(source, name=name)
        encoded = encode_rows(
            rows,
            self.tokenizer,
            max_length=self.options.max_length,
            truncation=self.options.truncation,
            invalid_rows=invalid_rows or self.options.invalid_rows,
            chat_template=self.options.chat_template,
            chat_template_kwargs=self.options.chat_template_kwargs,
            name=name,
        )
        if not encoded.examples and not may_be_none:
            reasons = sorted(set(encoded.skipped.values()) - {"no_label_tokens"})
            also = f"; others are skipped as {', '.join(reasons)}" if reasons else ""
            raise DataError(f"{rows.source}: no row has a label token that the model could learn from{also}")
        check_token_ids(self.model, encoded.examples, rows, labels=self.check_labels)
        return encoded

    def reference(self, source: Any, name: str) -> list[Example]:
        """Raises DataError for every row that would not count, too."""
        rows = load_rows(source, name=name)
        encoded = self.read(rows, name, invalid_rows="error")
        if encoded.skipped:
            row, reason = next(iter(encoded.skipped.items()))
            where = rows.where(row)
            raise DataError(f"{where}: {reason}; every row of the reference must count, remove it or shorten it")
        return encoded.examples
