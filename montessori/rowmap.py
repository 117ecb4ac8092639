"""Which rows of an activation belong to which example of a batch.

Dimensions: B examples, T padded tokens, n rows of an activation without padding, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from montessori.batching import Batch
from montessori.errors import ModelError
from montessori.losses import label_rows


class UnmappableRowsError(ModelError):
    """An activation's rows cannot be told apart by example; `module` names where."""

    def __init__(self, module: str, shape: tuple[int, ...], size: int) -> None:
        self.module = module
        super().__init__(
            f"{module}: activation {list(shape)} has no dimension that separates the {size} examples of a batch"
        )


@dataclass(frozen=True)
class RowMap:
    """Maps activations of one batch to packed rows per example.

    `kept` and `dropped` are the flat positions b·T + t of real tokens and of padding, `offsets`
    int64 [B+1] the bounds of the former, `label_offsets` the bounds of the rows that reach the vocabulary head.
    """

    size: int
    length: int
    kept: Tensor
    dropped: Tensor
    offsets: Tensor
    label_offsets: Tensor

    @classmethod
    def of(cls, batch: Batch) -> RowMap:
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
        )

    def padded(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor] | None:
        """x [N, I] and dy [N, O], of which the rows `kept` are the batch; None where that is not so, or without
        padding."""
        tokens = self.size * self.length
        same = x.shape[:-1] == dy.shape[:-1] and x.shape[:-1] in {(self.size, self.length), (tokens,)}
        if not same or not self.dropped.numel():
            return None
        return x.reshape(tokens, -1), dy.reshape(tokens, -1)

    def pack_gradient(self, dy: Tensor, module: str) -> tuple[Tensor, Tensor]:
        """`pack` for the gradient of an activation, which must be 0 wherever padding is dropped.

        Raises UnmappableRowsError where it is not: padding takes part in the loss, or the dimensions
        are not the tokens they look like.
        """
        packed, offsets = self.pack(dy, module)
        if self.dropped.numel() and int(offsets[-1]) < dy[..., 0].numel():
            self.check_padding(dy, module)
        return packed, offsets

    def check_padding(self, dy: Tensor, module: str) -> None:
        """Raise UnmappableRowsError where padding has a gradient."""
        lost = dy.reshape(self.size * self.length, -1).index_select(0, self.dropped)
        if bool((lost.abs() > 0).any()):
            raise UnmappableRowsError(module, tuple(dy.shape), self.size)

    def pack(self, activation: Tensor, module: str) -> tuple[Tensor, Tensor]:
        """Rows [n, F] of an activation [..., F] without padding, and their offsets int64 [B+1].

        Understood: [B, T, ..., F], [B·T, F] in the same order, [1, n, F] or [n, F] at the labelled
        positions, and [B, ..., F]. Raises UnmappableRowsError otherwise.
        """
        lead, features = activation.shape[:-1], activation.shape[-1]
        tokens = self.size * self.length
        if lead[:2] == (self.size, self.length):
            return self._packed_tokens(activation.reshape(tokens, -1, features))
        if lead == (tokens,):
            return self._packed_tokens(activation.reshape(tokens, 1, features))
        labelled = int(self.label_offsets[-1])
        if lead in {(1, labelled), (labelled,)}:
            return activation.reshape(labelled, features), self.label_offsets
        if self.size == 1 or (lead and lead[0] == self.size):
            rows = activation.reshape(self.size, -1, features)
            return rows.flatten(0, 1), torch.arange(self.size + 1) * rows.shape[1]
        raise UnmappableRowsError(module, tuple(activation.shape), self.size)

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

    def _packed_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        kept = rows.index_select(0, self.kept) if self.dropped.numel() else rows
        return kept.flatten(0, 1), self.offsets * rows.shape[1]


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int64).cpu()
