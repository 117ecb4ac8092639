"""What a proof on this model finds before a score can be wrong: caps, heads, hooks, copies, long texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from support import make_model, make_rows, slow_influence, warm_optimizer
from torch import nn

from montessori import InfluenceEstimator, ScoreJournal
from montessori.batching import collate, examples_from_tokens
from montessori.errors import FallbackWarning, ModelError, StateError
from montessori.head import returns_logits
from montessori.losses import prove_packing, response_loss
from montessori.referenceset import ReferenceSets

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
CAPPED = {
    "gemma2 30": lambda: transformers.Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=30.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.97),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=1.02),
}


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def examples_of(rows):
    return list(examples_from_tokens(rows, "rows"))


def batch_of(rows):
    return collate(examples_of(rows))


def rows_of(*lengths):
    """Rows of random tokens, all but the first three labelled."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in texts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CAPPED, "llama"])
def test_a_cap_or_a_scale_is_found_however_small_the_logits(name, dtype):
    model = build(CAPPED.get(name, lambda: transformers.LlamaConfig(**SIZES))(), dtype)
    with torch.no_grad():
        assert returns_logits(model, model.get_output_embeddings(), batch_of(make_rows(2))) == (name == "llama")


def test_a_cap_that_shows_after_training_only_is_kept():
    model = build(transformers.Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=3.0))
    optimizer = warm_optimizer(model)
    rows, references = make_rows(4, seed=1), make_rows(3, seed=2)
    found = InfluenceEstimator(model, optimizer, references, method="first_order")
    found.score(rows)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    want = slow_influence(model, optimizer, rows, references, "first_order")
    got = found.score(rows).influence
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


class Headed(nn.Module):
    """A causal model of one's own, which does something with its logits by position."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.embed, self.mix, self.head = nn.Embedding(61, 16), nn.Linear(16, 16), nn.Linear(16, 61, bias=False)
        self.bias = nn.Parameter(torch.randn(61))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]).tanh()
        logits = self.head(x)
        if self.what == "smoothed":
            logits = logits + 0.5 * nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1]
        elif self.what == "by position":
            logits = logits / (1 + 0.1 * torch.arange(logits.shape[1], dtype=x.dtype)[:, None])
        elif self.what == "bias of another shape":
            logits = logits + self.bias.expand(input_ids.shape[1], -1)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize("what", ["nothing", "smoothed", "by position", "bias of another shape"])
@pytest.mark.parametrize("method", ["first_order", "exact"])
def test_what_follows_the_head_by_position_is_computed_there(what, method):
    model = Headed(what).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows, references = make_rows(4, seed=1), make_rows(3, seed=2)

    def loss(model, batch):
        logits = model(batch.input_ids).logits[:, :-1]
        tokens = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none")
        return tokens.sum(1) / (batch.labels[:, 1:] != -100).sum(1)

    for row in rows:
        optimizer.zero_grad()
        (loss(model, batch_of([row])).sum() + 0 * model.bias.sum()).backward()
        optimizer.step()
    optimizer.zero_grad()
    if what != "bias of another shape":
        model.bias.requires_grad_(False)
        optimizer.param_groups[0]["params"].remove(model.bias)
        optimizer.state.pop(model.bias, None)
    want = InfluenceEstimator(model, optimizer, references, loss_fn=loss, reference_loss_fn=loss, method=method)
    got = InfluenceEstimator(model, optimizer, references, method=method)
    np.testing.assert_allclose(got.score(rows).influence, want.score(rows).influence, rtol=1e-7)


def test_the_head_of_an_ordinary_model_runs_on_labels_alone():
    model, seen = make_model("llama_untied"), []
    batch = batch_of(make_rows(3))
    prove_packing(model, batch)
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape[:2]))
    response_loss(model, batch)
    assert seen == [(1, int((batch.labels[:, 1:] != -100).sum()))]


def test_a_loss_that_holds_the_model_cannot_use_the_float32_copy():
    model = make_model("llama_tied", torch.bfloat16)
    optimizer = warm_optimizer(model)
    for method in ("exact", "anchored"):
        found = InfluenceEstimator(
            model, optimizer, make_rows(3, seed=2), method=method, loss_fn=lambda _, batch: response_loss(model, batch)
        )
        with pytest.raises(ModelError, match="a copy computes with its weights"):
            found.score(make_rows(3, seed=1))


class Tasks(nn.Module):
    """A language model whose forward wants to know the task of each row, as PEFT's Poly and multitask prompts do."""

    def __init__(self, dtype):
        super().__init__()
        self.model, self.scales = make_model("llama_tied", dtype), nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, input_ids, task_ids=None):
        if task_ids is None:
            raise ValueError("task_ids should not be None.")
        logits = self.model(input_ids=input_ids).logits
        return transformers.utils.ModelOutput(logits=logits * self.scales[task_ids, None, None])


class WithHead(Tasks):
    def get_output_embeddings(self):
        return self.model.get_output_embeddings()


def of_the_first_task(model, batch):
    ids, targets = batch.input_ids, batch.labels[:, 1:]
    logits = model(input_ids=ids, task_ids=torch.zeros_like(ids[:, 0])).logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, targets, reduction="none").sum(1) / (targets != -100).sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["exact", "anchored", "first_order"])
@pytest.mark.parametrize("kind", [Tasks, WithHead])
def test_a_forward_that_needs_more_arguments_is_told_how_to_get_them(kind, method, dtype):
    model = kind(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows, references = make_rows(3, seed=1), make_rows(3, seed=2)
    with pytest.raises(ModelError, match=r"ValueError: task_ids .* pass loss_fn= and reference_loss_fn="):
        InfluenceEstimator(model, optimizer, references, method=method).score(rows)
    losses = {"loss_fn": of_the_first_task, "reference_loss_fn": of_the_first_task}
    assert InfluenceEstimator(model, optimizer, references, method=method, **losses).score(rows).influence.any()


def test_hooks_on_gradients_do_not_enter_the_reference_gradient():
    model = make_model("llama_tied")
    sets = ReferenceSets({"reference": examples_of(make_rows(3))}, "example_mean", 4096)
    parameters, stepped = dict(model.named_parameters()), []
    want, _ = sets.gradient(model, parameters, response_loss)
    weight = model.model.embed_tokens.weight
    weight.register_hook(lambda grad: grad * 0.1)
    weight.register_post_accumulate_grad_hook(lambda parameter: stepped.append(parameter))
    got, _ = sets.gradient(model, parameters, response_loss)
    assert all(torch.equal(got[name], want[name]) for name in want) and not stepped
    response_loss(model, batch_of(make_rows(1))).sum().backward()
    assert stepped and len(weight._backward_hooks) == 1


def doge():
    return build(transformers.DogeConfig(**SIZES, keep_window_size=20, is_moe=False), torch.float64)


def test_long_candidates_that_change_each_other_are_scored_alone():
    model = doge()
    optimizer = warm_optimizer(model)
    rows = rows_of(90, 85, 40, 30)
    found = InfluenceEstimator(model, optimizer, make_rows(3, seed=2), method="first_order")
    alone = np.concatenate([found.score([row]).influence for row in rows])
    with pytest.warns(FallbackWarning, match="depend on what shares their batch"):
        got = found.score(rows).influence
    np.testing.assert_allclose(got, alone, rtol=1e-9)


def test_candidates_scored_alone_go_on_after_a_kill_to_the_same_bytes(tmp_path):
    model = doge()
    optimizer = warm_optimizer(model)
    rows, path = rows_of(90, 85, 40, 30), tmp_path / "journal.jsonl"

    def score(journal=None):
        found = InfluenceEstimator(model, optimizer, make_rows(3, seed=2), method="first_order")
        with pytest.warns(FallbackWarning, match="depend on what shares their batch"):
            return found.score(rows, journal=journal)

    want = score().influence
    score(ScoreJournal(path))
    whole = path.read_bytes().splitlines(keepends=True)
    for kept in range(2, len(whole)):
        path.write_bytes(b"".join(whole[:kept]))
        np.testing.assert_array_equal(score(ScoreJournal(path)).influence, want)
        assert path.read_bytes() == b"".join(whole)


def test_long_references_that_change_each_other_are_taken_alone():
    model = doge().float()
    optimizer = warm_optimizer(model)
    references = rows_of(90, 60, 40)
    with pytest.warns(FallbackWarning, match="the reference is taken one row at a time"):
        got = InfluenceEstimator(model, optimizer, references, method="exact").score(make_rows(2, seed=5))
    with torch.no_grad():
        want = np.mean([float(response_loss(model, batch_of([row]))) for row in references])
    assert got.reference_loss == pytest.approx(want, rel=1e-6)


def test_passes_that_cannot_be_captured_are_one_line():
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)

    def by_rows(model, batch):
        losses = [
            model(input_ids=ids[None], labels=labels[None]).loss
            for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
        ]
        return torch.stack(losses).double()

    references = make_rows(3, seed=2)
    found = InfluenceEstimator(model, optimizer, references, "first_order", loss_fn=by_rows, reference_loss_fn=by_rows)
    with pytest.warns(FallbackWarning, match="no capture rule holds"):
        influence = found.score(make_rows(3, seed=1)).influence
    plain = InfluenceEstimator(model, optimizer, references, "first_order").score(make_rows(3, seed=1)).influence
    # transformers computes its loss from float32 logits.
    np.testing.assert_allclose(influence, plain, rtol=1e-4)

    def of_one(model, batch):
        if batch.size > 1:
            raise RuntimeError(f"one row, please, in place of {model}")
        return response_loss(model, batch)

    with pytest.raises(ModelError, match=r"the loss function fails for row \d, \d \(RuntimeError: one row") as caught:
        InfluenceEstimator(model, optimizer, references, loss_fn=of_one).score(make_rows(3, seed=1))
    assert len(str(caught.value)) < 500 < len(str(model))
    # As a model is trained under autocast: narrow weights, wide norms.
    model = make_model("llama_tied", torch.bfloat16)
    optimizer = warm_optimizer(model)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    with pytest.raises((ModelError, StateError)):
        InfluenceEstimator(model, optimizer, references, method="first_order").score(make_rows(3, seed=1))


def after(marker, empty):
    """The mean loss of labelled tokens behind a marker; 0 or NaN, as `empty` says, where a text has none."""

    def loss(model, batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        targets = batch.labels[:, 1:]
        token_loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        counted = ((batch.input_ids == marker).cumsum(1)[:, :-1] > 0) & (targets != -100)
        number = counted.sum(1)
        return (token_loss * counted).sum(1) / (number.clamp(min=1) if empty == 0 else number)

    return loss


class UsedTwice(nn.Module):
    """A model that uses a weight behind its module's back, which a proof finds where there is a gradient."""

    def __init__(self):
        super().__init__()
        self.inner = make_model("llama_tied")

    def forward(self, input_ids, attention_mask=None, **_):
        out = self.inner(input_ids=input_ids)
        projected = torch.tanh(out.logits) @ self.inner.model.embed_tokens.weight
        out.logits = out.logits + nn.functional.linear(projected, self.inner.model.embed_tokens.weight)
        return out


@pytest.mark.parametrize("empty", [0, float("nan")])
def test_a_loss_is_proved_on_whole_candidates_that_have_a_gradient(empty):
    """Of the first ones none has: their marker stands at the end. No reference has any."""
    marker = 7
    references, rows = (
        [{**row, "input_ids": [8 if token == marker else token for token in row["input_ids"]]} for row in made]
        for made in (make_rows(3, seed=2), make_rows(6, seed=1))
    )
    for row, place in zip(rows, (-1, 0, -1, 0, -1, 0), strict=True):
        row["input_ids"][place] = marker
    references, rows = (
        [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in made] for made in (references, rows)
    )
    model = UsedTwice()
    optimizer = warm_optimizer(model)

    def score(method, **losses):
        made = InfluenceEstimator(model, optimizer, references, method, lr=1e-6, reference_loss_fn=plain, **losses)
        return made.score(rows if empty == 0 else rows[1::2]).influence

    def plain(model, batch):
        logits = model(batch.input_ids).logits[:, :-1].transpose(1, 2)
        targets = batch.labels[:, 1:]
        return nn.functional.cross_entropy(logits, targets, reduction="none").sum(1) / (targets != -100).sum(1)

    influence, exact = (score(method, loss_fn=after(marker, empty)) for method in ("anchored", "exact"))
    np.testing.assert_allclose(influence, exact, rtol=0, atol=0.005 * np.ptp(exact))


def test_an_anchor_that_leaves_the_finite_is_told_from_a_row_that_does():
    model = make_model("llama_untied", torch.float32)
    optimizer = warm_optimizer(model)
    # 0 / 0 where a token has never been met.
    optimizer.param_groups[0]["eps"] = 0.0
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[model.model.embed_tokens.weight][name].zero_()
    with pytest.raises(ModelError, match="the mean step of the pilot candidates, the anchor, leads to where"):
        InfluenceEstimator(model, optimizer, make_rows(3)).score(make_rows(3, seed=1))
