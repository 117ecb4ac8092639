"""What the proof of the capture costs: windows of its examples, wherever their labels are."""

from __future__ import annotations

import pytest
import torch
from support import VOCABULARY, make_model

from montessori.batching import IGNORE_INDEX, Example
from montessori.coverage import PROOF_TOKENS, verified_plan
from montessori.losses import response_loss


def long_example(tokens: int, first_label: int, seed: int) -> Example:
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(tokens) < first_label, torch.full_like(ids, IGNORE_INDEX), ids)
    return Example(ids, labels, seed)


@pytest.mark.parametrize("first_label", [0, 1, 150, 399])
@pytest.mark.parametrize("count", [1, 2])
def test_long_examples_are_proved_on_windows_that_have_labels(first_label, count):
    model = make_model("llama_tied")
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    plan = verified_plan(model, [long_example(400, first_label, seed) for seed in range(count)], response_loss)
    assert max(ids.shape[1] for ids in seen) == PROOF_TOKENS[0]
    assert not plan.fallback
    assert plan.head is not None
