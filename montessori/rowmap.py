"""Which rows of an activation belong to which example of a batch.

Dimensions: B examples, T padded tokens, n rows of an activation without padding, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from montessori.batching import Batch
from montessori.errors import ModelError
from montessori.losses import label_rows


class UnmappableRowsError(ModelError):
    """An activation's rows cannot be told apart by example; `module` names where, unless a `reason` is given."""

    def __init__(self, module: str, shape: tuple[int, ...], size: int, reason: str | None = None) -> None:
        self.module = module
        no_dimension = f"activation {list(shape)} has no dimension that separates the {size} examples of a batch"
        super().__init__(reason or f"{module}: {no_dimension}")


@dataclass(frozen=True)
class Rows:
    """Rows [N, F] of an activation, of which example b has offsets[b+1] − offsets[b] (int64 [B+1], on the CPU): from
    starts[b] on (int64 [B], on the CPU), the rest being padding, or one after the other without `starts`."""

    values: Tensor
    offsets: Tensor
    starts: Tensor | None = None


@dataclass(frozen=True)
class RowMap:
    """Maps activations of one batch to rows per example.

    `kept` and `dropped` are the flat positions b·T + t of real tokens and of padding, `offsets`
    int64 [B+1] the bounds of the former, `label_offsets` the bounds of the rows that reach the vocabulary head: the
    module `labelled`, or any module that is given so many rows.
    """

    size: int
    length: int
    kept: Tensor
    dropped: Tensor
    offsets: Tensor
    label_offsets: Tensor
    labelled: str | None = None
    # Lengths of further texts that a loss of the user's own gives the model for each example.
    others: set[int] = field(default_factory=set)
    _suspects: list[tuple[str, tuple[int, ...], Tensor]] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, batch: Batch, labelled_module: str | None = None) -> RowMap:
        mask = batch.attention_mask.bool()
        size, length = mask.shape
        flat = mask.flatten()
        labelled = torch.bincount(label_rows(batch) // length, minlength=size)
        return cls(
            size,
            length,
            flat.nonzero().flatten(),
            (~flat).nonzero().flatten(),
            _offsets(mask.sum(1)),
            _offsets(labelled),
            labelled_module,
        )

    def with_padding(self, length: int) -> RowMap:
        """The map of texts of `length` tokens, padding among them: where it has no gradient, no sum changes."""
        positions = torch.arange(self.size * length, device=self.kept.device)
        offsets = torch.arange(self.size + 1) * length
        return replace(self, length=length, kept=positions, dropped=positions[:0], offsets=offsets)

    def rows(self, activation: Tensor, module: str) -> Rows:
        """Rows of an activation [..., F], none of them copied.

        Understood: [B, T, ..., F], [B·T, F] in the same order, [1, n, F] or [n, F] at the labelled
        positions, and [B, ..., F]. Raises UnmappableRowsError otherwise.
        """
        lead, features = activation.shape[:-1], activation.shape[-1]
        tokens = self.size * self.length
        if lead[:2] == (self.size, self.length):
            return self._token_rows(activation.reshape(tokens, -1, features))
        if lead == (tokens,):
            return self._token_rows(activation.reshape(tokens, 1, features))
        labelled = int(self.label_offsets[-1])
        if lead in {(1, labelled), (labelled,)} and (self.labelled is None or module.startswith(self.labelled)):
            return Rows(activation.reshape(labelled, features), self.label_offsets)
        if len(lead) == 1 and self.is_text(lead[0]):
            return Rows(activation, torch.arange(self.size + 1) * (lead[0] // self.size))
        if self.size == 1 or (lead and lead[0] == self.size):
            rows = activation.reshape(self.size, -1, features)
            return Rows(rows.flatten(0, 1), torch.arange(self.size + 1) * rows.shape[1])
        raise UnmappableRowsError(module, tuple(activation.shape), self.size)

    def is_text(self, count: int) -> bool:
        """Whether so many rows are those of one of `others`, example by example."""
        return count % self.size == 0 and count // self.size in self.others

    def gradient_rows(self, dy: Tensor, module: str) -> Rows:
        """`rows` of the gradient of an activation, which must be 0 wherever there is padding; `settle` says so."""
        rows = self.rows(dy, module)
        if rows.starts is not None:
            lost = dy.reshape(self.size * self.length, -1).index_select(0, self.dropped)
            self._suspects.append((module, tuple(dy.shape), (lost.abs() > 0).any()))
        return rows

    def settle(self) -> None:
        """Raise UnmappableRowsError where padding had a gradient: it takes part in the loss, or the dimensions are not
        the tokens they look like. Asked once for all layers, since the answer may have to come from a GPU."""
        if self._suspects and bool(torch.stack([found for *_, found in self._suspects]).any()):
            module, shape = next(suspect[:2] for suspect in self._suspects if bool(suspect[2]))
            raise UnmappableRowsError(module, shape, self.size)

    def pack(self, rows: Rows) -> Tensor:
        """The rows [n, F] of all examples without padding, in order."""
        if rows.starts is None:
            return rows.values
        per_token = rows.values.shape[0] // (self.size * self.length)
        return rows.values.unflatten(0, (-1, per_token)).index_select(0, self.kept).flatten(0, 1)

    def of_tokens(self, tokens: Tensor, dy: Tensor, module: str) -> tuple[Tensor, Tensor]:
        """Of rows at the sorted flat positions `tokens`, int64 [n], those that are not padding, and their offsets.

        Raises UnmappableRowsError where padding has a gradient in dy [n, O].
        """
        kept = self._real[tokens]
        if bool((dy[~kept].abs() > 0).any()):
            raise UnmappableRowsError(module, tuple(dy.shape), self.size)
        examples = tokens[kept] // self.length
        return kept, _offsets(torch.bincount(examples, minlength=self.size))

    @cached_property
    def _real(self) -> Tensor:
        real = torch.zeros(self.size * self.length, dtype=torch.bool, device=self.kept.device)
        real[self.kept] = True
        return real

    def _token_rows(self, rows: Tensor) -> Rows:
        per_token = rows.shape[1]
        starts = torch.arange(self.size) * self.length * per_token if self.dropped.numel() else None
        return Rows(rows.flatten(0, 1), self.offsets * per_token, starts)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int64).cpu()
