"""Tokenised examples, and batches of them under a token budget.

Shapes: B examples of a batch, T tokens of its longest example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from montessori.errors import ArgumentError, DataError, ResourceError

IGNORE_INDEX = -100
# TRL's, of rows without labels: 1 where a token enters the loss.
LABEL_MASKS = ("completion_mask", "assistant_masks")
PACKING = ("position_ids", "seq_lengths")
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")

# Padding that a batch may have, as a share of it, once it has enough tokens to keep a processor busy.
MOST_PADDING = 0.1
BUSY_TOKENS = 1024


@dataclass(frozen=True)
class Example:
    """One tokenised example: `input_ids` and `labels`, int64 [T] on the CPU, without padding.

    `labels[t]` is `input_ids[t]` where the token counts in the loss and -100 elsewhere; position t
    is predicted from the tokens before it. `index` is the row number in the user's input. `row` is that row, for a
    loss function of the user's own; lists as long as its `input_ids` are cut where they were.
    """

    input_ids: Tensor
    labels: Tensor
    index: int
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_label_tokens(self) -> int:
        """Tokens that enter the loss. A label on the first token has no prefix and does not count."""
        # Of a short row numpy takes a fraction of torch's time.
        return int(np.count_nonzero(self.labels.numpy()[1:] != IGNORE_INDEX))

    def digest(self) -> bytes:
        """Hash of the tokens, the same wherever the example stands in the input."""
        payload = self.input_ids.numpy().tobytes() + b"|" + self.labels.numpy().tobytes()
        return hashlib.sha256(payload).digest()


@dataclass(frozen=True)
class Batch:
    """Padded examples: `input_ids`, `attention_mask`, `labels`, all int64 [B, T].

    `labels` are not shifted. `index` holds the row numbers of the B examples in the input that they are of: a set of
    the reference, or the rows of one call. `rows` are the rows themselves with all their columns, for a loss function
    of the user's own; else they are empty.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    index: tuple[int, ...]
    rows: tuple[Mapping[str, Any], ...] = ()

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def named(self) -> str:
        """Numbers of its rows for an error, of the first few."""
        return ", ".join(map(str, self.index[:4])) + (", ..." if self.size > 4 else "")

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples on the right to the longest of them. The padding token is 0; nothing looks at it."""
    longest = max(example.num_tokens for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64, device="cpu")
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        span = slice(0, example.num_tokens)
        input_ids[row, span], labels[row, span], mask[row, span] = example.input_ids, example.labels, 1
    index, rows = (tuple(getattr(example, name) for example in examples) for name in ("index", "row"))
    return Batch(input_ids, mask, labels, index, rows)


def with_row(example: Example, row: Mapping[str, Any]) -> Example:
    """The example with its row: of a row of tokens, lists with a value for each are cut as `input_ids` were, at the end
    or where the attention mask is 0."""
    ids = row.get("input_ids")
    if ids is None or len(ids) == example.num_tokens:
        return replace(example, row=row)
    mask = row.get("attention_mask")
    first = 0 if mask is None else int(torch.as_tensor(mask, device="cpu").nonzero()[0])
    span = slice(first, first + example.num_tokens)
    return replace(example, row={key: value[span] if _counts(value, len(ids)) else value for key, value in row.items()})


def _counts(value: object, length: int) -> bool:
    """Whether it is a sequence of `length` values."""
    return hasattr(value, "__len__") and not isinstance(value, str | Mapping) and len(value) == length


def make_batches(examples: Sequence[Example], batch_tokens: int, name: str = "candidates") -> list[list[Example]]:
    """Group examples of similar length so that B times the longest stays within `batch_tokens`.

    A batch of more than some 1,000 tokens is closed before a tenth of it would be padding. The grouping
    depends on lengths and row numbers only, so the same input always gives the same batches. Longest first:
    the first batch shows the peak of memory.
    """
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise ArgumentError(f"batch_tokens={batch_tokens!r}: expected a positive number of tokens")
    ordered = sorted(examples, key=lambda example: (-example.num_tokens, example.index))
    if ordered and ordered[0].num_tokens > batch_tokens:
        raise ResourceError(
            f"{name} row {ordered[0].index} has {ordered[0].num_tokens} tokens, more than batch_tokens={batch_tokens}: "
            "raise batch_tokens, or cut long examples with max_length and truncation='right'"
        )
    batches: list[list[Example]] = []
    real = 0
    for example in ordered:
        if batches and _joins(batches[-1], real, example, batch_tokens):
            batches[-1].append(example)
            real += example.num_tokens
        else:
            batches.append([example])
            real = example.num_tokens
    return batches


def one_by_one_beyond(batches: Sequence[list[Example]], length: int) -> list[list[Example]]:
    """`batches`, those with an example of more than `length` tokens taken apart."""
    taken = [[batch] if batch[0].num_tokens <= length else [[example] for example in batch] for batch in batches]
    return [batch for group in taken for batch in group]


def _joins(batch: Sequence[Example], real: int, example: Example, batch_tokens: int) -> bool:
    """Whether `example` still goes into `batch`, which has `real` tokens and begins with its longest."""
    padded = (len(batch) + 1) * batch[0].num_tokens
    padding = padded - real - example.num_tokens
    return padded <= batch_tokens and (real < BUSY_TOKENS or padding <= MOST_PADDING * padded)


def examples_from_tokens(rows: Sequence[Mapping[str, object]], name: str) -> Iterator[Example]:
    """Examples from rows that carry `input_ids`, `labels` and, optionally, `attention_mask` and `position_ids`.

    A row without labels has them where the masks of TRL, `completion_mask` and `assistant_masks`, are 1. Padding named
    by the attention mask, on either side, is cut off. Token types other than 0 are refused, and packed texts.
    """
    for index, row in enumerate(rows):
        where = f"{name} row {index}"
        try:
            input_ids = torch.as_tensor(row["input_ids"], device="cpu")
            masks = {key: torch.as_tensor(row[key], device="cpu") for key in LABEL_MASKS if row.get(key) is not None}
            labels = torch.as_tensor(row["labels"], device="cpu") if "labels" in row or not masks else input_ids
            mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(input_ids)), device="cpu")
        except KeyError as error:
            raise DataError(f"{where}: expected columns input_ids and labels, {error} is missing") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{where}: expected flat lists of token ids, got {error}") from None
        if input_ids.dim() != 1 or input_ids.shape != labels.shape or input_ids.shape != mask.shape:
            raise DataError(
                f"{where}: expected input_ids, labels and attention_mask of one length, got shapes "
                f"{list(input_ids.shape)}, {list(labels.shape)} and {list(mask.shape)}"
            )
        for key, ids in (("input_ids", input_ids), ("labels", labels)):
            if ids.numel() and (ids.is_floating_point() or ids.dtype is torch.bool):
                raise DataError(f"{where}: expected integer {key}, got {ids.dtype}")
        for key, marks in masks.items() if "labels" not in row else ():
            labels = _where_marked(labels, marks, f"{where}: expected {key}")
        if not ((mask == 0) | (mask == 1)).all():
            raise DataError(f"{where}: expected attention_mask of 0 and 1, got other values")
        kept = mask.to(torch.bool).nonzero().flatten()
        if kept.numel() == 0:
            raise DataError(f"{where}: no token (input_ids is empty or attention_mask is all 0)")
        span = slice(int(kept[0]), int(kept[-1]) + 1)
        if kept.numel() != span.stop - span.start:
            raise DataError(f"{where}: attention_mask has a hole; expected padding at the ends only")
        _check_unpacked(row, span, where)
        _check_token_types(row, where)
        yield Example(input_ids[span].to(torch.int64).cpu(), labels[span].to(torch.int64).cpu(), index)


def _check_unpacked(row: Mapping[str, object], kept: slice, where: str) -> None:
    """The texts of a packed row begin where its positions start again, or after each of TRL's `seq_lengths`."""
    found = {key: torch.as_tensor(row[key], device="cpu") for key in PACKING if row.get(key) is not None}
    positions, lengths = (found.get(key) for key in PACKING)
    counted = torch.arange(kept.stop - kept.start, device="cpu")
    if positions is not None and not torch.equal(positions.flatten()[kept].long(), counted):
        expected = "position_ids that count up by 1 from 0, or none"
    elif lengths is not None and lengths.numel() > 1:
        expected = "seq_lengths of one text, or none"
    else:
        return
    raise DataError(f"{where}: expected {expected}; packed texts are not kept apart, give each a row of its own")


def _where_marked(labels: Tensor, marks: Tensor, expected: str) -> Tensor:
    if marks.shape != labels.shape:
        raise DataError(f"{expected} of the length of input_ids, got shapes {[*marks.shape]} and {[*labels.shape]}")
    if not ((marks == 0) | (marks == 1)).all():
        raise DataError(f"{expected} to be 0 and 1, got other values")
    return torch.where(marks == 1, labels, IGNORE_INDEX)


def _check_token_types(row: Mapping[str, object], where: str) -> None:
    # Models for images and text change their attention mask by them, and an example does not carry them.
    for column in TOKEN_TYPES:
        types = row.get(column)
        if types is not None and torch.as_tensor(types, device="cpu").any():
            raise DataError(
                f"{where}: expected {column} of 0 alone, got others; only text without token types is scored: remove "
                "the column if the model does not use it, else leave the row out"
            )


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples spread evenly over all of them in order of their content's hash."""
    ordered = sorted(examples, key=lambda example: (example.digest(), example.index))
    count = min(count, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
