"""Preference pairs as candidates or as the reference: their rows, a reference model's margins, and the loss of DPO.

    ℓ = −log σ(β (m − m_ref)),   m = log π(chosen | prompt) − log π(rejected | prompt)

(Rafailov et al., Direct Preference Optimization, 2023, Eq. 7), as `trl.DPOTrainer` trains on a pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from montessori.batching import Batch, Example, collate, make_batches
from montessori.columns import SYSTEM_COLUMNS
from montessori.data import load_rows
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError
from montessori.losses import response_logprobs
from montessori.passes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = ("prompt", "chosen", "rejected")
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

    `pairs`: rows, a dataset or a path. A row has `prompt`, `chosen` and `rejected`, texts or lists of messages. Where
    `prompt` is missing, or is a text beside lists of messages, the prompt is what chosen and rejected begin with
    alike, as in TRL. The other arguments are those of `encode_rows`, of which "skip" is none.

    Raises DataError, naming the row, for one that is no pair, and as `encode_rows` does.
    """
    if truncation == "skip":
        raise ArgumentError("truncation='skip': expected 'error' or 'right', since a pair stays a pair")
    rows = load_rows(pairs, name="pairs")
    asked = [_prompt_and_answers(row, rows.where(index)) for index, row in enumerate(rows)]
    settings: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "chat_template": chat_template}
    settings["chat_template_kwargs"] = chat_template_kwargs
    sides = []
    for side in ("chosen", "rejected"):
        texts = [
            {**{key: row[key] for key in _CONTEXT if key in row}, "prompt": prompt, "completion": answers[side]}
            for row, (prompt, answers) in zip(rows, asked, strict=True)
        ]
        found = encode_rows(replace(rows, rows=texts), tokenizer, **settings)
        if found.skipped:
            index, reason = next(iter(found.skipped.items()))
            raise DataError(f"{rows.where(index)}: {side}: {reason}; every pair must count, remove it or shorten it")
        sides.append([{"input_ids": one.input_ids.tolist(), "labels": one.labels.tolist()} for one in found.examples])
    others = [{key: value for key, value in row.items() if key not in _TEXT} for row in rows]
    return [{**other, **chosen, "rejected": rejected} for other, chosen, rejected in zip(others, *sides, strict=True)]


@torch.no_grad()
def with_reference_margins(
    pairs: Sequence[Mapping[str, Any]], model: nn.Module, *, batch_tokens: int = 4096, progress: bool = False
) -> list[dict[str, Any]]:
    """The rows of `encode_pairs` with `reference_margin`, m_ref of `model`, in nats.

    Of a policy with LoRA call it within `model.disable_adapter()`. `batch_tokens` bounds the padded tokens of a batch.
    """
    chosen = [_example(pair, index) for index, pair in enumerate(pairs)]
    rejected = [_example(_rejected(pair, index), index + len(pairs)) for index, pair in enumerate(pairs)]
    examples = [*chosen, *rejected]
    longest = max((example.num_tokens for example in examples), default=1)
    device, found = next(model.parameters()).device, torch.zeros(len(examples), dtype=torch.float64)
    batches = make_batches(examples, max(batch_tokens, longest), "pairs")
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="reference margins", unit="batch", disable=not progress):
            found[[example.index for example in batch]] = response_logprobs(model, collate(batch).to(device)).cpu()
    margins = (found[: len(pairs)] - found[len(pairs) :]).tolist()
    return [{**pair, "reference_margin": margin} for pair, margin in zip(pairs, margins, strict=True)]


@dataclass(frozen=True)
class DPO:
    """The loss of a pair, for `loss_fn` or `reference_loss_fn`: the sigmoid loss of `trl.DPOTrainer`, [B].

    With `label_smoothing` ε, ℓ = −(1 − ε) log σ(z) − ε log σ(−z) of z = β (m − m_ref).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ArgumentError(f"beta={self.beta!r}: expected a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ArgumentError(f"label_smoothing={self.label_smoothing!r}: expected at least 0 and below 0.5")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        pairs = [_example(_rejected(row, index), index) for row, index in zip(batch.rows, batch.index, strict=True)]
        before = [_column(row, "reference_margin", index) for row, index in zip(batch.rows, batch.index, strict=True)]
        device = batch.labels.device
        margin = response_logprobs(model, batch) - response_logprobs(model, collate(pairs).to(device))
        z = self.beta * (margin - torch.tensor(before, dtype=margin.dtype, device=device))
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)


def _prompt_and_answers(row: Any, where: str) -> tuple[Any, dict[str, Any]]:
    if not isinstance(row, Mapping) or any(not row.get(side) for side in ("chosen", "rejected")):
        raise DataError(f"{where}: expected columns chosen and rejected, both filled, and prompt if they lack it")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise DataError(f"{where}: expected chosen and rejected to be two texts or two lists of messages, got {kinds}")
    if chosen == rejected:
        raise DataError(f"{where}: expected chosen and rejected to differ, got the same")
    if prompt and isinstance(prompt, str) == isinstance(chosen, str):
        return prompt, {"chosen": chosen, "rejected": rejected}
    alike = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and alike and chosen[alike - 1] == " ":
        # A blank belongs to the word that it stands before.
        alike -= 1
    answers = {"chosen": chosen[alike:], "rejected": rejected[alike:]}
    if not alike or not all(answers.values()):
        raise DataError(f"{where}: expected a prompt, or chosen and rejected that begin alike and go on otherwise")
    return chosen[:alike], answers


def _rejected(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    return _column(row, "rejected", index)


def _example(tokens: Mapping[str, Any], index: int) -> Example:
    ids, labels = (torch.tensor(_column(tokens, key, index)) for key in ("input_ids", "labels"))
    return Example(ids, labels, index)


def _column(row: Mapping[str, Any], name: str, index: int) -> Any:
    if not isinstance(row, Mapping) or row.get(name) is None:
        raise DataError(f"pair {index}: expected {name}, as encode_pairs and with_reference_margins leave it")
    return row[name]
