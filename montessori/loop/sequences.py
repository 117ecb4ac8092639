"""Batches of sequences in a model: the logits of the next token of each, with the model's cache or without."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from montessori.errors import FallbackWarning, ModelError
from montessori.loop.cache import cache_name, read_prompts, select_rows, taken_by
from montessori.options import floating_dtype
from montessori.wording import first_line

# Of the largest logit, what a cache may differ by, in float32 and in narrow dtypes, where rounding adds up over layers;
# one that serves other rows is 4 % off or more.
_TOLERANCE, _NARROW_TOLERANCE = 1e-3, 0.03
_PROOF_LENGTHS = (3, 8, 9)


class Sequences(Protocol):
    """A batch of sequences in a model: `logits` float32 [B, V] of the next token of each."""

    logits: Tensor

    def __init__(self, model: Any, ids: Sequence[Sequence[int]]) -> None: ...

    def keep(self, rows: Tensor) -> None:
        """Go on with `rows` of the batch, int64 [B'], which may repeat."""

    def step(self, tokens: Tensor) -> None:
        """Read one more token of each sequence, int64 [B]."""


class Cached(Sequences):
    """With the model's cache: equal prompts are read once, and of each sequence only its new token."""

    def __init__(self, model: Any, ids: Sequence[Sequence[int]]) -> None:
        self._model, self._device = model, model.device
        unique = list(dict.fromkeys(map(tuple, ids)))
        self._cache, self._mask, self.logits = read_prompts(model, unique)
        self.keep(torch.tensor([unique.index(tuple(prompt)) for prompt in ids]))

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self._device)
        select_rows(self._cache, rows)
        self._mask, self.logits = self._mask[rows], self.logits[rows]

    def step(self, tokens: Tensor) -> None:
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        output = self._model(
            input_ids=tokens.to(self._device)[:, None],
            **taken_by(self._model, attention_mask=self._mask, position_ids=positions, use_cache=True),
            **{cache_name(self._model): self._cache},
        )
        self.logits = output.logits[:, -1].float()


class Reread(Sequences):
    """Without a cache: every step reads all sequences again from their start."""

    logits: Tensor

    def __init__(self, model: Any, ids: Sequence[Sequence[int]]) -> None:
        self._model, self._device = model, model.device
        self._sequences = [list(prompt) for prompt in ids]
        self._read()

    def keep(self, rows: Tensor) -> None:
        self._sequences = [list(self._sequences[row]) for row in rows.tolist()]
        self.logits = self.logits[rows.to(self._device)]

    def step(self, tokens: Tensor) -> None:
        for sequence, token in zip(self._sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        self._read()

    def _read(self) -> None:
        longest = max(map(len, self._sequences))
        # Padding stands on the right, where a causal model never looks.
        tokens = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in self._sequences])
        tokens = tokens.to(self._device)
        asked = taken_by(self._model, attention_mask=torch.ones_like(tokens), use_cache=False)
        logits = self._model(input_ids=tokens, **asked).logits
        last = torch.tensor([len(sequence) - 1 for sequence in self._sequences], device=self._device)
        self.logits = logits[torch.arange(len(last), device=self._device), last].float()


@torch.inference_mode()
def proved_sequences(model: Any) -> type[Sequences]:
    """`Cached` where it gives the logits that `Reread` gives, on a few tokens; else `Reread`, with a FallbackWarning.

    Caches hold more than keys and values: windows, states of linear attention, positions counted from padding.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts = [[(11 + 7 * place + length) % vocabulary for place in range(length)] for length in _PROOF_LENGTHS]
    prompts.append(prompts[1])
    want = _tried(Reread, model, prompts, vocabulary)
    if not bool(want.isfinite().all()):
        dtype = str(floating_dtype(model)).removeprefix("torch.")
        raise ModelError(
            f"{type(model).__name__}: expected finite logits, got NaN or Inf in {dtype}: set engine.dtype to bfloat16 "
            "or float32, or check the weights"
        )
    # Whatever a model raises that does not take what batches do with a cache.
    try:
        differing = _off(_tried(Cached, model, prompts, vocabulary), want)
        reason = f"its logits are {differing:.0%} off"
    except Exception as error:
        differing, reason = torch.inf, first_line(error)
    if differing <= (_NARROW_TOLERANCE if floating_dtype(model).itemsize < 4 else _TOLERANCE):
        return Cached
    warnings.warn(
        f"{type(model).__name__}: batches cannot use its cache ({reason}); every token reads the whole text again, "
        "which is slower: use another engine for long texts",
        FallbackWarning,
        stacklevel=2,
    )
    return Reread


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _tried(kind: type[Sequences], model: Any, prompts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Logits [S, V] of all sequences and steps of a short trial in which rows are left out, repeated and moved."""
    sequences = kind(model, prompts)
    found = [sequences.logits]
    for rows in ([0, 1, 2, 3], [3, 0, 2], [1, 1, 0]):
        sequences.keep(torch.tensor(rows))
        sequences.step(torch.tensor([(5 + 13 * place) % vocabulary for place in range(len(rows))]))
        found.append(sequences.logits)
    return torch.cat(found)
