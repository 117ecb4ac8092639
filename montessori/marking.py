"""Conversations through templates that mark the assistant's text with {% generation %}."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from montessori.batching import IGNORE_INDEX, Example
from montessori.columns import Chat
from montessori.cutting import answers, text_of
from montessori.errors import DataError
from montessori.templates import Template


def marked_example(chat: Chat, template: Template) -> Example:
    output = template.apply(
        chat.messages,
        chat.where,
        chat.variables,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    mask = torch.tensor(output["assistant_masks"], dtype=torch.bool, device="cpu")
    if not mask.any():
        raise DataError(
            f"{chat.where}: the chat template marks no token with {{% generation %}}; put the content of "
            f"the assistant inside that block"
        )
    for first, end in _unlabelled_tokens(chat, template, mask, output["offset_mapping"]):
        mask[first:end] = False
    input_ids = torch.tensor(output["input_ids"], dtype=torch.int64, device="cpu")
    return Example(input_ids, torch.where(mask, input_ids, IGNORE_INDEX), chat.index)


def _unlabelled_tokens(
    chat: Chat, template: Template, mask: Tensor, offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """From which token to which the assistant's turns are without labels, of those that the template marks."""
    edges = itertools.pairwise([-1, *chat.labelled, len(chat.messages)])
    spans = [(before + 1, after) for before, after in edges if any(before < turn < after for turn in answers(chat))]
    whole = text_of(chat, template) if spans else ""
    texts = {turns: text_of(chat, template, turns) if turns else "" for turns in {*itertools.chain(*spans)}}
    if all(whole.startswith(text) for text in texts.values()):
        starts = [start for start, _ in offsets]
        return [(bisect_left(starts, len(texts[first])), bisect_left(starts, len(texts[end]))) for first, end in spans]
    # What the template ends a conversation with stands in none of its beginnings.
    steps = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int().diff()
    runs = list(zip(*((steps == step).nonzero().flatten().tolist() for step in (1, -1)), strict=True))
    if len(runs) != len(answers(chat)):
        raise DataError(
            f"{chat.where}: the chat template writes turns otherwise once others follow, so that those without labels "
            f"cannot be told from the others; give a template that does not, or input_ids and labels"
        )
    return [run for turn, run in zip(answers(chat), runs, strict=True) if turn not in chat.labelled]
