"""The vocabulary head by chunks: the same scores, whatever fits into memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from op_cases import simd_levels
from support import CONFIGS, VOCABULARY, clip_loop, make_model, make_rows, slow_influence, warm_optimizer

from montessori import InfluenceEstimator, head, ops
from montessori.batching import collate, examples_from_tokens
from montessori.coverage import proved_loss, verified_plan
from montessori.errors import ArgumentError, FallbackWarning, ModelError
from montessori.losses import response_loss
from montessori.parameters import trainable_parameters
from montessori.referenceset import ReferenceSets

RTOL = 1e-9
# All at once; some examples at a time; one example at a time, by blocks of 7 rows of the vocabulary and less.
SIZES = [1 << 20, 8 * VOCABULARY * 12, 8 * 7 * 8]


def phi():
    """A model whose head has a bias."""
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    return model


MODELS = {"phi": phi} | {name: lambda name=name: make_model(name) for name in ("llama_tied", "llama_untied", "gpt2")}


def examples(count=4):
    return list(examples_from_tokens(make_rows(count, seed=3), "rows"))


@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_any_size_give_the_scores_of_single_examples(monkeypatch, name, size, clipping):
    monkeypatch.setattr(head, "most_logits", lambda hidden, weight: size // 8)
    model = MODELS[name]()
    optimizer, candidates, references = warm_optimizer(model), make_rows(6, seed=1), make_rows(3, seed=2)
    limit = clip_loop(monkeypatch, model, candidates) if clipping else None
    got = InfluenceEstimator(model, optimizer, references, method="first_order", max_grad_norm=limit).score(candidates)
    want = slow_influence(model, optimizer, candidates, references, "first_order")
    np.testing.assert_allclose(got.influence, want, rtol=RTOL)


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_have_their_head_by_chunks(name):
    model = MODELS[name]()
    assert verified_plan(model, examples(2), response_loss).head is model.get_output_embeddings()


@pytest.mark.parametrize("name", ["gemma2"])
def test_a_head_whose_logits_are_capped_goes_another_way(name):
    model = make_model(name)
    assert CONFIGS[name]().final_logit_softcapping
    assert verified_plan(model, examples(2), response_loss).head is None


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch):
    monkeypatch.setattr(head, "most_logits", lambda hidden, weight: 7 * 8)
    model, batch = make_model("llama_tied"), collate(examples())
    seen = []
    product = head.product

    def watched(x, weight, bias=None):
        out = product(x, weight, bias)
        if x.shape[-1] == hidden.shape[-1]:
            seen.append(out.numel() * out.element_size())
        return out

    with torch.no_grad():
        want = response_loss(model, batch)
        hidden = head.hidden_states(model, model.lm_head, batch)
        offsets = torch.tensor([0, *((row.labels[1:] != -100).sum() for row in examples())]).cumsum(0)
        monkeypatch.setattr(head, "product", watched)
        losses, _ = head.ChunkedHead.of(model.lm_head, batch, offsets, "auto").run(hidden)
    torch.testing.assert_close(losses, want, rtol=RTOL, atol=0)
    assert 0 < max(seen) <= 8 * 7 * 8


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_by_chunks_has_the_loss_and_the_gradient_of_the_whole(monkeypatch, name, size):
    monkeypatch.setattr(head, "most_logits", lambda hidden, weight: size // 8)
    model, rows = MODELS[name](), examples(5)
    sets = ReferenceSets({"short": rows[:2], "long": rows[2:]}, "token_mean", 4096)
    chunked, parameters = head.ChunkedLoss(model.get_output_embeddings()), trainable_parameters(model)
    q, loss = sets.gradient(model, parameters, chunked)
    want, want_loss = sets.gradient(model, parameters, response_loss)
    for key, value in want.items():
        torch.testing.assert_close(q[key], value, rtol=RTOL, atol=1e-12)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    # The difference of two losses is what the anchor is about: with and without a gradient they have the same bits.
    assert torch.equal(loss, sets.loss(model, chunked))
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_frozen_head_by_chunks_gets_no_gradient():
    model, rows = make_model("llama_untied"), examples(3)
    model.lm_head.requires_grad_(False)
    sets = ReferenceSets({"rows": rows}, "example_mean", 4096)
    parameters = trainable_parameters(model)
    q, _ = sets.gradient(model, parameters, head.ChunkedLoss(model.lm_head))
    want, _ = sets.gradient(model, parameters, response_loss)
    assert "lm_head.weight" not in q and model.lm_head.weight.grad is None
    for key, value in want.items():
        torch.testing.assert_close(q[key], value, rtol=RTOL, atol=1e-12)


@pytest.mark.parametrize("alone", ["lm_head.weight", "lm_head.bias"])
def test_a_head_that_is_trained_alone_has_its_gradient_by_chunks(alone):
    model, rows = phi(), examples(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == alone)
    sets = ReferenceSets({"rows": rows}, "example_mean", 4096)
    q, _ = sets.gradient(model, trainable_parameters(model), head.ChunkedLoss(model.lm_head))
    want, _ = sets.gradient(model, trainable_parameters(model), response_loss)
    torch.testing.assert_close(q[alone], want[alone], rtol=RTOL, atol=1e-12)


def test_a_reference_that_reaches_nothing_trainable_is_refused():
    model, rows = make_model("llama_untied"), examples(2)
    model.requires_grad_(False)
    spare = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ModelError, match="does not depend on any trainable parameter"):
        ReferenceSets({"rows": rows}, "example_mean", 4096).gradient(
            model, {"spare": spare}, head.ChunkedLoss(model.lm_head)
        )


def test_losses_by_chunks_are_refused_a_scale_that_they_were_not_told():
    model, batch = make_model("llama_tied"), collate(examples(2))
    losses = head.ChunkedLoss(model.lm_head)(model, batch)
    with pytest.raises(ModelError, match="not scaled as was said"):
        (losses * 2).sum().backward()


@pytest.mark.parametrize(("name", "chunked"), [("llama_tied", True), ("gemma2", False)])
def test_the_reference_goes_by_chunks_only_where_that_is_the_models_own_loss(name, chunked):
    model, rows = make_model(name), examples(2)
    assert isinstance(proved_loss(model, rows, response_loss, "auto"), head.ChunkedLoss) == chunked

    def own(model, batch):
        return response_loss(model, batch)

    assert proved_loss(model, rows, own, "auto") is own


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_head_whose_weight_is_computed_has_its_whole_gradient(name):
    model = make_model("llama_untied")
    getattr(torch.nn.utils.parametrizations, name)(model.lm_head)
    model.eval()
    optimizer, candidates, references = warm_optimizer(model), make_rows(4, seed=1), make_rows(3, seed=2)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model.train()
    with pytest.warns(FallbackWarning):
        got = InfluenceEstimator(model, optimizer, references, method="first_order").score(candidates)
    # In train mode spectral norms step on with every look at the weight.
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())
    model.eval()
    want = slow_influence(model, optimizer, candidates, references, "first_order")
    np.testing.assert_allclose(got.influence, want, rtol=RTOL)


HOSTILE = {
    "ordinary": torch.randn(5, 61, generator=torch.Generator().manual_seed(0)),
    "one_class": torch.zeros(3, 1),
    "many_classes": torch.randn(2, 5003, generator=torch.Generator().manual_seed(1)) * 3,
    "far_apart": torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]),
    "sharp": torch.randn(4, 333, generator=torch.Generator().manual_seed(2)) * 60,
    "no_row": torch.zeros(0, 7),
}


@pytest.mark.parametrize("impl", ops.available_impls())
@pytest.mark.parametrize("name", HOSTILE)
def test_cross_entropy_is_as_exact_as_plain_torch(name, impl):
    logits = HOSTILE[name]
    targets = torch.arange(len(logits)) % logits.shape[1]
    weights = torch.linspace(0.1, 1, len(logits))

    def specified(values):
        leaf = values.clone().requires_grad_()
        losses = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
        (losses * weights.to(values.dtype)).sum().backward()
        return losses.detach().double(), leaf.grad.double()

    got = logits.clone()
    losses = ops.cross_entropy_(got, targets, weights, impl=impl)
    eps = torch.finfo(torch.float32).eps
    (want_loss, want_grad), (plain_loss, plain_grad) = specified(logits.double()), specified(logits)
    # Twice the plain path's error, and a few roundings of the largest number in it.
    scale = 4 * eps * logits.abs().amax(-1).clamp(min=1)
    assert torch.all((losses - want_loss).abs() <= 2 * (plain_loss - want_loss).abs() + scale)
    assert torch.all((got.double() - want_grad).abs() <= 2 * (plain_grad - want_grad).abs() + 8 * eps)


@pytest.mark.parametrize("impl", ops.available_impls())
@pytest.mark.parametrize("simd", simd_levels())
@pytest.mark.parametrize("bits", ["7fc00000", "7fffffff", "7fc00001", "7f800001", "ffffffff"])
@pytest.mark.parametrize("columns", [7, 40])
def test_nan_in_one_row_of_logits_stays_there(monkeypatch, impl, simd, bits, columns):
    """Of any bits: GPUs write others than processors do."""
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    logits = torch.randn(3, columns)
    logits[1, 5] = torch.frombuffer(bytearray.fromhex(bits)[::-1], dtype=torch.float32)[0]
    losses = ops.cross_entropy_(logits, torch.tensor([0, 1, 2]), torch.ones(3), impl=impl)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": torch.tensor([0, 9])}, "expected ids in 0..3"),
        ({"targets": torch.tensor([0])}, "targets"),
        ({"weights": torch.ones(2, dtype=torch.float64)}, "as the logits"),
        ({"logits": torch.zeros(4, 2).T}, "contiguous"),
    ],
)
def test_cross_entropy_refuses_what_does_not_fit(change, words):
    given = {"logits": torch.zeros(2, 4), "targets": torch.tensor([0, 1]), "weights": torch.ones(2)} | change
    with pytest.raises(ArgumentError, match=words):
        ops.cross_entropy_(given["logits"], given["targets"], given["weights"])
