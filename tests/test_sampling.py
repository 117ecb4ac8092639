"""Scoring a share of each weight's tiles: unbiased, with an honest standard error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from support import make_rows, warm_optimizer

from montessori import AdamWStep, InfluenceEstimator, Scores, SGDStep, cpu, ops
from montessori.errors import ArgumentError

needs_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}")

ADAMW = AdamWStep(lr=1e-3, eps=1e-6, step=5, weight_decay=0.1)
SGD = SGDStep(lr=0.1, momentum=0.9, weight_decay=0.1, step=3)


@pytest.fixture
def layer():
    """A weight of some 80 tiles; (x, dy, offsets) and (q, exp_avg, exp_avg_sq, param)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (700, 600)
    state = (normal(2, *shape), normal(*shape), normal(*shape).square() + 0.1, normal(*shape))
    return (normal(9, 600), normal(9, 700), torch.tensor([0, 4, 4, 9])), state


def score_at_zero(state, step):
    return ops.adam_influence(None, *state, step)


@needs_kernels
@pytest.mark.parametrize("step", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_all_tiles_give_the_exact_score_without_error(layer, step):
    batch, state = layer
    scores, variance = ops.sampled_linear_influence(*batch, *state, step, tiles=ops.draw_tiles(state[0], 1.0, seed=0))
    exact = ops.linear_influence(*batch, *state, step) - score_at_zero(state, step)
    torch.testing.assert_close(scores, exact, rtol=1e-6, atol=float(exact.abs().max()) * 1e-6)
    assert not variance.any()


@needs_kernels
def test_estimates_are_unbiased_and_their_variance_is_what_they_show(layer):
    batch, state = layer
    exact = ops.linear_influence(*batch, *state, ADAMW) - score_at_zero(state, ADAMW)
    drawn = [ops.draw_tiles(state[0], 0.25, seed) for seed in range(400)]
    draws = [ops.sampled_linear_influence(*batch, *state, ADAMW, tiles=tiles) for tiles in drawn]
    scores, variances = (torch.stack(values) for values in zip(*draws, strict=True))
    seen = scores.var(0)
    # Example 1 is empty: nothing is sampled there. Five standard errors of a mean of 400 draws.
    some = [0, 2]
    assert torch.all((scores.mean(0) - exact)[some].abs() <= 5 * (seen[some] / 400).sqrt())
    assert torch.all((variances.mean(0)[some] / seen[some] - 1).abs() < 0.35)
    assert not variances[:, 1].any()


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (700, 600), (1500, 7)])
@pytest.mark.parametrize("sample", [0.01, 0.25, 0.6, 1.0])
def test_strata_cover_every_tile_once_and_what_dominates_is_always_drawn(shape, sample):
    q = torch.full((2, *shape), 1e-3)
    q[:, 0, 0] = 1e3
    tiles = ops.draw_tiles(q, sample, seed=1)
    count = ops.draw_tiles(q, 1.0, seed=1).tiles.numel()
    drawn = tiles.bounds.diff()
    assert int(tiles.population.sum()) == count
    assert tiles.tiles.unique().numel() == tiles.tiles.numel() == min(count, max(2, round(sample * count)))
    assert torch.all(drawn <= tiles.population)
    assert torch.all(drawn >= torch.clamp(tiles.population, max=2))
    if sample == 1.0:
        assert torch.equal(drawn, tiles.population)
    if drawn.numel() > 1:
        assert 0 in tiles.tiles.tolist()


@needs_kernels
def test_tiles_of_another_weight_are_refused(layer):
    batch, state = layer
    tiles = ops.draw_tiles(torch.ones(1, 2000, 600), 0.5, seed=0)
    with pytest.raises(ArgumentError, match=r"drawn for q \[2, 700, 600\], got those of \[1, 2000, 600\]"):
        ops.sampled_linear_influence(*batch, *state, ADAMW, tiles=tiles)


@needs_kernels
def test_an_example_has_the_same_estimate_in_any_company(layer):
    (x, dy, _), state = layer
    tiles = ops.draw_tiles(state[0], 0.3, seed=7)
    together, _ = ops.sampled_linear_influence(x, dy, torch.tensor([0, 4, 9]), *state, ADAMW, tiles=tiles)
    alone, _ = ops.sampled_linear_influence(x[4:], dy[4:], torch.tensor([0, 5]), *state, ADAMW, tiles=tiles)
    assert torch.equal(together[1], alone[0])


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model, warm_optimizer(model)


def scored(student, **settings):
    model, optimizer = student
    return InfluenceEstimator(model, optimizer, make_rows(4, seed=2), **settings).score(make_rows(12, seed=1))


@needs_kernels
def test_a_sampled_run_reports_its_error_and_keeps_it_in_the_file(student, tmp_path):
    full, part = scored(student), scored(student, sample=0.25)
    assert full.standard_error is None
    assert part.standard_error.shape == part.influence.shape
    assert np.all(part.standard_error > 0)
    assert np.all(np.abs(part.influence - full.influence) <= 6 * part.standard_error)
    assert part.drift == pytest.approx(full.drift, rel=1e-6)
    loaded = Scores.load(part.save(tmp_path / "scores.parquet"))
    np.testing.assert_array_equal(loaded.standard_error, part.standard_error)


@needs_kernels
def test_sampled_experts_are_estimates_of_the_same_scores():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    student = model, warm_optimizer(model)
    full, whole, part = scored(student), scored(student, sample=0.999), scored(student, sample=0.5)
    assert not whole.standard_error.any(), "every tile is drawn"
    # Float32 products, of which 1e-5 is left of the differences to the step without a gradient.
    np.testing.assert_allclose(whole.influence, full.influence, rtol=0, atol=1e-5 * np.abs(full.centred).max())
    assert np.all(part.standard_error > 0)
    assert np.all(np.abs(part.influence - full.influence) <= 6 * part.standard_error)


@needs_kernels
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"sample": 0.0}, "0 < sample <= 1"), ({"sample": 1.5}, "0 < sample <= 1"),
     ({"sample": 0.5, "method": "exact"}, "real steps")],
)  # fmt: skip
def test_impossible_samples_are_one_line_errors(student, settings, words):
    with pytest.raises(ArgumentError, match=words):
        scored(student, **settings)


@needs_kernels
@pytest.mark.parametrize("change", ["float64", "reference"])
def test_what_cannot_be_sampled_is_refused_before_anything_is_computed(student, change):
    model, optimizer = student
    if change == "float64":
        model = transformers.AutoModelForCausalLM.from_config(model.config).double()
        optimizer = warm_optimizer(model)
    backend = "reference" if change == "reference" else "auto"
    with pytest.raises(ArgumentError, match="sample < 1"):
        InfluenceEstimator(model, optimizer, make_rows(4, seed=2), sample=0.5, backend=backend)
