"""Preference pairs as candidates or as the reference: their rows, a reference model's margins, and the loss of DPO.

    ℓ = −log σ(β (m − m_ref)),   m = log π(chosen | prompt) − log π(rejected | prompt)

(Rafailov et al., Direct Preference Optimization, 2023, Eq. 7), as `trl.DPOTrainer` trains on a pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from montessori.batching import IGNORE_INDEX, Batch, Example, collate, examples_from_tokens, make_batches
from montessori.columns import SYSTEM_COLUMNS
from montessori.data import load_rows
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError
from montessori.files import without_fillers
from montessori.losses import response_logprobs
from montessori.options import check_positions
from montessori.passes import evaluation_mode
from montessori.templates import NO_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIDES = ("chosen", "rejected")
_QUESTIONS = ("prompt", "question", "instruction")
# Of another encoding of the row.
_OF_TOKENS = ("input_ids", "labels", "attention_mask", "position_ids", "completion_mask", "assistant_masks")
# What stands beside a prompt. Some tables have the chosen conversation once more, in `messages`.
_CONTEXT = (*SYSTEM_COLUMNS, "history", "tools", "chat_template_kwargs")


def encode_pairs(
    pairs: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    truncation: str = "error",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of token ids that `DPO` takes: `input_ids` and `labels` of prompt and chosen answer, in `rejected` a dict
    with those of prompt and rejected answer, and other columns as they are.

    `pairs`: rows, a dataset or a path. A row has `chosen` and `rejected`, texts or lists of messages, and `prompt`, or
    `question` or `instruction` in its place. Conversations that begin alike hold their prompt themselves; so do texts,
    with `chat_template="none"`, which have the tokens and labels of TRL. The other arguments are those of
    `encode_rows`, of which "skip" is none.

    Raises DataError, naming the row, for one that is no pair, and as `encode_rows` does.
    """
    if truncation == "skip":
        raise ArgumentError("truncation='skip': expected 'error' or 'right', since a pair stays a pair")
    rows, as_texts = load_rows(pairs, name="pairs"), chat_template == NO_TEMPLATE
    asked = [_prompt_and_answers(row, as_texts, rows.where(index)) for index, row in enumerate(rows)]
    settings: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "chat_template": chat_template}
    settings["chat_template_kwargs"] = chat_template_kwargs
    sides = []
    for place, side in enumerate(_SIDES):
        texts = [
            {**{key: row[key] for key in _CONTEXT if key in row}, "prompt": prompt, "completion": answers[place]}
            for row, (prompt, answers) in zip(rows, asked, strict=True)
        ]
        try:
            found = encode_rows(replace(rows, rows=texts), tokenizer, **settings)
        except DataError as error:
            raise DataError(f"{error} ({side} stands in the place of completion; a pair is not left out)") from error
        if found.skipped:
            index, reason = next(iter(found.skipped.items()))
            raise DataError(f"{rows.where(index)}: {side}: {reason}; every pair must count, remove it or shorten it")
        sides.append(found.examples)
    for index, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        if torch.equal(chosen.input_ids, rejected.input_ids) and torch.equal(chosen.labels, rejected.labels):
            raise DataError(
                f"{rows.where(index)}: expected chosen and rejected to differ, got the same {chosen.num_tokens} "
                "tokens; they differ beyond max_length, or in what has no tokens"
            )
    taken = {"prompt", *_SIDES, *_OF_TOKENS}
    others = [{key: value for key, value in row.items() if key not in taken} for row in rows]
    both = [_tokens(chosen, rejected, as_texts) for chosen, rejected in zip(*sides, strict=True)]
    return [{**other, **chosen, "rejected": rejected} for other, (chosen, rejected) in zip(others, both, strict=True)]


@torch.no_grad()
def with_reference_margins(
    pairs: Iterable[Mapping[str, Any]], model: nn.Module, *, batch_tokens: int = 4096, progress: bool = False
) -> list[dict[str, Any]]:
    """The rows of `encode_pairs` with `reference_margin`, m_ref of `model`, in nats.

    `model` is the policy as it was before the first step of DPO: with new adapters, call this within
    `model.disable_adapter()`. `batch_tokens` bounds the padded tokens of a batch. Raises DataError for rows of other
    forms, ArgumentError for more tokens than the model has positions for.
    """
    rows = list(pairs)
    examples = [*_chosen(rows), *_rejected(rows, range(len(rows)))]
    examples = [replace(example, index=place) for place, example in enumerate(examples)]
    if not examples:
        return []
    longest = max(example.num_tokens for example in examples)
    check_positions(model, longest)
    device, found = next(model.parameters()).device, torch.zeros(len(examples), dtype=torch.float64)
    batches = make_batches(examples, max(batch_tokens, longest), "pairs")
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="reference margins", unit="batch", disable=not progress):
            found[[example.index for example in batch]] = response_logprobs(model, collate(batch).to(device)).cpu()
    margins = (found[: len(rows)] - found[len(rows) :]).tolist()
    return [{**row, "reference_margin": margin} for row, margin in zip(rows, margins, strict=True)]


@dataclass(frozen=True)
class DPO:
    """The loss of a pair, for `loss_fn` or `reference_loss_fn`: the sigmoid loss of `trl.DPOTrainer`, [B]."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not (isinstance(self.beta, Real) and 0 < self.beta < math.inf):
            raise ArgumentError(f"beta={self.beta!r}: expected a number above 0")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        device, rejected = batch.labels.device, _rejected(batch.rows, batch.index)
        before = [_column(row, "reference_margin", index) for row, index in zip(batch.rows, batch.index, strict=True)]
        margin = response_logprobs(model, batch) - response_logprobs(model, collate(rejected).to(device))
        return -F.logsigmoid(self.beta * (margin - torch.tensor(before, dtype=margin.dtype, device=device)))


def _prompt_and_answers(row: Any, as_texts: bool, where: str) -> tuple[Any, tuple[Any, Any]]:
    """What both answers are to, and the two answers."""
    if not isinstance(row, Mapping) or not all(row.get(side) for side in _SIDES):
        raise DataError(f"{where}: expected columns chosen and rejected, both filled")
    prompt, chosen, rejected = (without_fillers(_question(row)), *(without_fillers(row[side]) for side in _SIDES))
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise DataError(f"{where}: expected chosen and rejected to be two texts or two lists of messages, got {kinds}")
    if chosen == rejected:
        raise DataError(f"{where}: expected chosen and rejected to differ, got the same")
    if isinstance(chosen, str):
        if not prompt and not as_texts:
            raise DataError(f"{where}: expected a prompt; texts that begin with theirs need chat_template='none'")
        if isinstance(prompt, list):
            return prompt, (_said(chosen), _said(rejected))
        return (prompt, (chosen, rejected)) if prompt else _parted(chosen, rejected, where)
    whole = all(any(_role(message) == "user" for message in answer) for answer in (chosen, rejected))
    if isinstance(prompt, list) and prompt and not (chosen[: len(prompt)] == rejected[: len(prompt)] == prompt):
        return prompt, (chosen, rejected)
    if isinstance(prompt, str) and prompt and not whole:
        return [{"role": "user", "content": prompt}], (chosen, rejected)
    return _parted(chosen, rejected, where)


def _parted(chosen: Any, rejected: Any, where: str) -> tuple[Any, tuple[Any, Any]]:
    """What both begin with alike, and how they go on."""
    alike = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and alike and chosen[alike - 1] == " ":
        # A blank belongs to the word that it stands before.
        alike -= 1
    if not alike or not chosen[alike:] or not rejected[alike:]:
        raise DataError(f"{where}: expected a prompt, or chosen and rejected that begin alike and go on otherwise")
    return chosen[:alike], (chosen[alike:], rejected[alike:])


def _question(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in _QUESTIONS if row.get(name)), None)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _tokens(chosen: Example, rejected: Example, as_texts: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ids and labels of both; of texts labels begin at one place, as TRL has it, though a token may join prompt and
    answer in one of them alone."""
    first = min(int((one.labels != IGNORE_INDEX).nonzero()[0]) for one in (chosen, rejected)) if as_texts else 0
    both = []
    for one in (chosen, rejected):
        labels = torch.cat([one.labels[:first], one.input_ids[first:]]) if as_texts else one.labels
        both.append({"input_ids": one.input_ids.tolist(), "labels": labels.tolist()})
    return both[0], both[1]


def _chosen(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    for index, row in enumerate(rows):
        _column(row, "input_ids", index)
    return list(examples_from_tokens(rows, "pairs"))


def _rejected(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Example]:
    found = [_column(row, "rejected", number) for row, number in zip(rows, numbers, strict=True)]
    for tokens, number in zip(found, numbers, strict=True):
        _column(tokens, "input_ids", number)
    examples = list(examples_from_tokens(found, "pairs, rejected:"))
    for example, number in zip(examples, numbers, strict=True):
        if not example.num_label_tokens:
            raise DataError(f"pair {number}: rejected: expected a label at least")
    return examples


def _column(row: Any, name: str, index: int) -> Any:
    if not isinstance(row, Mapping) or row.get(name) is None:
        raise DataError(f"pair {index}: expected {name}, as encode_pairs and with_reference_margins leave it")
    return row[name]
