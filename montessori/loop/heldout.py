"""Loss of a model on rows it was not trained on, one value per row."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from montessori.batching import Example, collate, make_batches
from montessori.data import Rows
from montessori.encoding import encode_rows
from montessori.errors import DataError
from montessori.fingerprint import examples_digest
from montessori.holdings import model_digest
from montessori.journal import ScoreJournal
from montessori.losses import response_loss
from montessori.options import default_max_length
from montessori.passes import evaluation_mode, example_losses


def encode_heldout(
    rows: Rows, model: Any, tokenizer: Any, *, max_length: int | None = None, **chat: Any
) -> list[Example]:
    """Examples of all rows, longer ones cut at the end; `model` or its config says how long.

    `chat`: chat_template and chat_template_kwargs of `encode_rows`.
    Raises DataError for a row without a token to predict.
    """
    encoded = encode_rows(
        rows,
        tokenizer,
        max_length=max_length or default_max_length(model),
        truncation="right",
        name="evaluation",
        **chat,
    )
    if encoded.skipped:
        row, reason = next(iter(encoded.skipped.items()))
        raise DataError(f"{rows.where(row)}: {reason}; every held-out row must count, remove it or raise max_length")
    return encoded.examples


@torch.no_grad()
def row_losses(
    model: Any,
    examples: list[Example],
    batch_tokens: int = 4096,
    journal: ScoreJournal | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Mean token loss of each example, float64 [N], in the order of `examples`; nats per token.

    `journal` keeps finished batches, so that a killed run goes on.
    """
    device = next(model.parameters()).device
    longest = max(example.num_tokens for example in examples)
    batches = make_batches(examples, max(batch_tokens, longest))
    losses: dict[int, float] = {}
    total = sum(example.num_tokens for example in examples)
    with ExitStack() as stack:
        if journal is not None:
            fingerprint = {"model": model_digest(model), "rows": examples_digest(examples), "batches": len(batches)}
            for record in stack.enter_context(journal.opened(fingerprint)).records:
                losses.update(zip(record["index"], record["loss"], strict=True))
        stack.enter_context(evaluation_mode(model))
        bar = stack.enter_context(tqdm(total=total, unit="tok", desc="held-out loss", disable=not progress))
        for batch in batches:
            index = [example.index for example in batch]
            if not losses.keys() >= set(index):
                values = example_losses(model, collate(batch).to(device), response_loss).tolist()
                losses.update(zip(index, values, strict=True))
                if journal is not None:
                    journal.append({"index": index, "loss": values})
            bar.update(sum(example.num_tokens for example in batch))
    return np.array([losses[example.index] for example in examples])
