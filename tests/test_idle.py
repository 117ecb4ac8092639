"""Models with parameters that text does not reach: towers for images, of which the optimizer has no moments."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers
from support import make_model, make_rows, plain_loss, reference_loss, warm_optimizer
from torch import nn

from montessori import AdamWState, InfluenceEstimator
from montessori.batching import Example, collate
from montessori.checkpoints import read_state
from montessori.errors import IdleWarning, StateError
from montessori.losses import response_loss
from montessori.options import default_max_length

CANDIDATES, REFERENCES = make_rows(4, seed=1), make_rows(3, seed=2)
TOWER = ("model.vision_tower.", "model.multi_modal_projector.")


def make_llava(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    text = make_model("llama_untied").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=text.vocab_size - 1)
    return transformers.LlavaForConditionalGeneration(config).to(dtype).eval()


def freeze_tower(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(TOWER))


def score(model: nn.Module, optimizer: object, method: str = "anchored") -> np.ndarray:
    return InfluenceEstimator(model, optimizer, REFERENCES, method=method).score(CANDIDATES).influence


def trainer_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Two groups in the order in which Trainer builds them, after some steps on text."""
    decayed = set(transformers.Trainer.get_decay_parameter_names(object.__new__(transformers.Trainer), model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [[p for name, p in named if (name in decayed) is decay] for decay in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}], lr=1e-4)
    for row in make_rows(4, seed=99):
        plain_loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_real_steps_of_a_whole_multimodal_model_are_predicted_and_taken():
    model = make_llava()
    optimizer = warm_optimizer(model, lr=1e-5)
    want = []
    for row in CANDIDATES:
        stepped, its_optimizer = copy.deepcopy((model, optimizer))
        before = reference_loss(stepped, REFERENCES).item()
        plain_loss(stepped, row).backward()
        its_optimizer.step()
        want.append(before - reference_loss(stepped, REFERENCES).item())
    np.testing.assert_allclose(score(model, optimizer, "exact"), want, rtol=1e-7)
    np.testing.assert_allclose(score(model, optimizer), want, atol=0.01 * np.ptp(want))


@pytest.mark.parametrize("method", ["anchored", "first_order", "exact"])
def test_scores_are_those_with_the_tower_frozen(method):
    model = make_llava()
    optimizer = trainer_optimizer(model)
    with pytest.warns(IdleWarning, match=r"^model.vision_tower, model.multi_modal_projector: \d+ trainable"):
        got = score(model, optimizer, method)
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_tower(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdleWarning)
        np.testing.assert_array_equal(got, score(model, optimizer, method))


def test_coverage_counts_what_is_scored():
    model = make_llava()
    estimator = InfluenceEstimator(model, trainer_optimizer(model), REFERENCES)
    text = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(TOWER))
    assert sum(estimator.coverage.values()) == text


def test_a_tower_that_gets_moments_between_two_calls_counts_from_then_on():
    model = make_llava()
    optimizer = trainer_optimizer(model)
    estimator = InfluenceEstimator(model, optimizer, REFERENCES)
    before, text = estimator.score(CANDIDATES).influence, sum(estimator.coverage.values())
    for parameter in model.parameters():
        if parameter not in optimizer.state:
            moments = {"exp_avg": torch.ones_like(parameter), "exp_avg_sq": torch.ones_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(4.0), **moments}
    np.testing.assert_allclose(estimator.score(CANDIDATES).influence, before, rtol=1e-9)
    assert sum(estimator.coverage.values()) == sum(p.numel() for p in model.parameters()) > text


@pytest.mark.parametrize("frozen_in_training", [True, False])
@pytest.mark.parametrize("frozen_in_scoring", [True, False])
def test_a_saved_optimizer_of_the_whole_or_of_the_text_is_found_in_either_model(
    tmp_path, frozen_in_training, frozen_in_scoring
):
    model = make_llava()
    if frozen_in_training:
        freeze_tower(model)
    optimizer = trainer_optimizer(model)
    want = score(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.requires_grad_(True)
    if frozen_in_scoring:
        freeze_tower(model)
    np.testing.assert_array_equal(score(model, tmp_path), want)


def test_adapters_in_the_tower_are_set_aside(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_llava(), config).double()
    assert any("vision_tower" in name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = trainer_optimizer(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    got = score(model, optimizer)
    np.testing.assert_array_equal(score(model, tmp_path), got)
    np.testing.assert_allclose(score(model, optimizer, "exact"), got, atol=0.01 * np.ptp(got))


def test_a_tower_with_moments_is_no_part_of_the_step_either():
    model = make_llava()
    optimizer = trainer_optimizer(model)
    want = score(model, optimizer)
    for name, parameter in model.named_parameters():
        if name.startswith(TOWER):
            moments = {"exp_avg": torch.ones_like(parameter), "exp_avg_sq": torch.ones_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(4.0), **moments}
    np.testing.assert_allclose(score(model, optimizer), want, rtol=1e-9)


class Switched(nn.Module):
    """Two layers of which an example takes one, by its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.parts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: torch.Tensor) -> transformers.modeling_outputs.CausalLMOutput:
        hidden = self.parts[int(input_ids[0, 0] > 31)](self.embed(input_ids))
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


def test_a_part_that_a_row_takes_after_all_is_named():
    torch.manual_seed(0)
    model = Switched().double()
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    response_loss_of(model, row).backward()
    optimizer.step()
    optimizer.zero_grad()
    estimator = InfluenceEstimator(model, optimizer, [row], method="exact")
    assert np.isfinite(estimator.score([row]).influence).all()
    with pytest.raises(StateError, match=r"^parts.1 takes part in a row, though not in others"):
        estimator.score([{"input_ids": [60, 2, 3], "labels": [60, 2, 3]}])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["first_order", "anchored", "exact"])
@pytest.mark.parametrize("audited", [False, True])
def test_a_part_that_some_candidates_do_not_reach_is_named_once(method, audited):
    torch.manual_seed(0)
    model = Switched().double()
    rows = [{"input_ids": [first, 2, 3], "labels": [first, 2, 3]} for first in (1, 60)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for row in rows:
        response_loss_of(model, row).backward()
    optimizer.step()
    optimizer.zero_grad()
    estimator = InfluenceEstimator(model, optimizer, rows, method=method)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", IdleWarning)
            estimator.audit([rows[0]] * 2, k=2) if audited else estimator.score(rows[:1])
        said = [str(warning.message) for warning in caught if warning.category is IdleWarning]
        assert len(said) == 1
        assert said[0].startswith("parts.1.bias, one of 2 parameter(s) that some candidates do not reach")


@pytest.mark.parametrize("method", ["first_order", "exact"])
def test_a_part_that_the_state_does_not_move_is_not_named(method):
    torch.manual_seed(0)
    model = Switched().double()
    rows = [{"input_ids": [first, 2, 3], "labels": [first, 2, 3]} for first in (1, 60)]
    estimator = InfluenceEstimator(model, torch.optim.SGD(model.parameters(), lr=0.1), rows, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdleWarning)
        estimator.score(rows[:1])


def response_loss_of(model: nn.Module, row: dict[str, list[int]]) -> torch.Tensor:

    return response_loss(
        model, collate([Example(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 0)])
    ).sum()


def test_moments_that_text_does_need_are_asked_for():
    model = make_llava()
    optimizer = trainer_optimizer(model)
    del optimizer.state[model.lm_head.weight]
    with pytest.raises(StateError, match=r"^optimizer state of lm_head.weight has no moments"):
        score(model, optimizer)
    with pytest.raises(StateError, match=r"missing for trainable model.language_model.embed_tokens.weight, .* 18 more"):
        score(model, AdamWState({}))


def test_a_layout_that_fits_nothing_is_refused(tmp_path):
    model = make_llava()
    saved = trainer_optimizer(model).state_dict()
    saved["param_groups"][0]["params"].pop()
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(StateError, match="expected param groups of"):
        read_state(tmp_path, model)


def test_positions_of_a_tower_are_no_limit_of_the_text():
    model = make_llava()
    assert model.model.vision_tower.embeddings.position_embedding.num_embeddings == 5
    assert default_max_length(model) == model.config.text_config.max_position_embeddings
    assert len(CANDIDATES[0]["input_ids"]) > 5
