"""What the proof of the capture costs: windows of its examples, wherever their labels are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import VOCABULARY, make_model, make_rows, slow_influence, warm_optimizer

from montessori import InfluenceEstimator
from montessori.batching import IGNORE_INDEX, Example
from montessori.coverage import PROOF_TOKENS, verified_plan
from montessori.errors import ModelError
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


@pytest.mark.filterwarnings("ignore::montessori.errors.FallbackWarning")
@pytest.mark.parametrize("kind", ["VeraConfig", "LoHaConfig"])
def test_adapters_that_no_rule_sees_are_left_to_autograd(kind):
    peft = pytest.importorskip("peft")
    base = make_model("llama_tied", torch.float32)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)
    model = peft.get_peft_model(base, config).double().eval()
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(4, seed=1), make_rows(3, seed=2)
    got = InfluenceEstimator(model, optimizer, references, method="first_order").score(candidates)
    want = slow_influence(model, optimizer, candidates, references, "first_order")
    np.testing.assert_allclose(got.influence, want, rtol=1e-9)


def test_a_model_that_adds_positions_of_its_own_is_refused_in_one_line():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make_model("llama_tied", torch.float32), config).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ModelError, match="prompt tuning"):
        InfluenceEstimator(model, optimizer, make_rows(3)).score(make_rows(2))
