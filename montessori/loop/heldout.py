"""Loss of a model on rows it was not trained on, one value per row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from montessori.batching import Example, collate, make_batches
from montessori.capture import evaluation_mode, example_losses
from montessori.data import Rows
from montessori.encoding import encode_rows
from montessori.errors import DataError
from montessori.losses import response_loss
from montessori.options import default_max_length


def encode_heldout(
    rows: Rows, model: Any, tokenizer: Any, *, max_length: int | None = None, chat_template: str | None = None
) -> list[Example]:
    """Examples of all rows, longer ones cut at the end. Raises DataError for a row without a token to predict."""
    encoded = encode_rows(
        rows,
        tokenizer,
        max_length=max_length or default_max_length(model),
        truncation="right",
        chat_template=chat_template,
        name="evaluation",
    )
    if encoded.skipped:
        row, reason = next(iter(encoded.skipped.items()))
        raise DataError(f"{rows.where(row)}: {reason}; every held-out row must count, remove it or raise max_length")
    return encoded.examples


@torch.no_grad()
def row_losses(model: Any, examples: list[Example], batch_tokens: int = 4096) -> np.ndarray:
    """Mean token loss of each example, float64 [N], in the order of `examples`; nats per token."""
    device = next(model.parameters()).device
    longest = max(example.num_tokens for example in examples)
    losses: dict[int, float] = {}
    with evaluation_mode(model):
        for batch in make_batches(examples, max(batch_tokens, longest)):
            values = example_losses(model, collate(batch).to(device), response_loss)
            losses.update(zip((example.index for example in batch), values.tolist(), strict=True))
    return np.array([losses[example.index] for example in examples])
