"""Keys and values of a batch of sequences: prompts are read with little padding, tokens added without copies."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

# Prompts are read together while the longest is at most so many times the shortest.
_STRETCH = 1.25
# Tokens that fit behind the keys and values before these have to be copied again.
_ROOM = 128


def read_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor, Tensor]:
    """The cache of distinct `prompts`, its mask int64 [B, L] and the logits of the next token, float32 [B, V].

    Prompts stand at the right end of the cache, whatever is before them is masked.
    """
    groups = _like_lengths(prompts)
    read = [_read(model, [prompts[row] for row in groups[0]])]
    if not all(type(layer) is DynamicLayer for layer in getattr(read[0][0], "layers", [None])):
        # Windows and states are not the prompt's keys alone, so there is nothing to put side by side.
        return read[0] if len(groups) == 1 else _read(model, prompts)
    read += [_read(model, [prompts[row] for row in group]) for group in groups[1:]]
    caches, masks, logits = zip(*read, strict=True)
    length = max(mask.shape[1] for mask in masks)
    back = torch.tensor([row for group in groups for row in group], device=model.device).argsort()
    cache = caches[0]
    for place, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        cache.layers[place] = _GrowingLayer(_stack(keys, length, back), _stack(values, length, back))
    mask = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
    return cache, mask[back], torch.cat(logits)[back]


def _like_lengths(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of `prompts`, shortest first, in groups of like length."""
    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        if groups and len(prompts[row]) <= _STRETCH * len(prompts[groups[-1][0]]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _read(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    mask = mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    asked = taken_by(model, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    output = model(input_ids=tokens.to(model.device), **asked)
    return output[cache_name(model)], mask, output.logits[:, -1].float()


def taken_by(model: Any, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the model's forward has a name for."""
    names = _argument_names(model)
    return {name: value for name, value in arguments.items() if name in names}


def _argument_names(model: Any) -> Any:
    # An adapter's wrapper hands on what it has no names for.
    return inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters


def select_rows(cache: Any, rows: Tensor) -> None:
    """Go on with `rows` of a cache, int64 [B'], which may repeat."""
    # What transformers has for beams takes the states of linear attention along, beside keys and values.
    for part in getattr(cache, "layers", [cache]):
        part.reorder_cache(rows)


def cache_name(model: Any) -> str:
    """What the model calls its cache, as an argument and in its output: transformers 5.24 and later have a new word."""
    return "cache" if "cache" in _argument_names(model) else "past_key_values"


def _stack(parts: Sequence[Tensor], length: int, back: Tensor) -> Tensor:
    """Keys or values [B, H, L, D] of all groups, in the order of the prompts."""
    padded = [F.pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts]
    return torch.cat(padded)[back]


class _GrowingLayer(DynamicLayer):
    """Keys and values with room behind them; without it all of them are copied for every token."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._set(keys, values, keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self._length
        end = start + key_states.shape[-2]
        keys, values = self._buffers
        if end > keys.shape[-2]:
            room = (0, 0, 0, end - keys.shape[-2] + _ROOM)
            keys, values = F.pad(keys, room), F.pad(values, room)
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        return self._set(keys, values, end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        keys, values = self._buffers
        self._set(keys[beam_idx], values[beam_idx], self._length)

    def _set(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self._buffers, self._length = (keys, values), length
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return self.keys, self.values
