"""Real steps: the same bits as torch's optimizers, the way back, clipping, and the naive loops."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import VOCABULARY, clip_loop, gradients, make_model, make_rows, plain_loss, slow_influence, warm_optimizer
from torch import nn

from montessori import AdamWState, InfluenceEstimator, naive
from montessori.batching import examples_from_tokens
from montessori.errors import ArgumentError
from montessori.losses import response_loss
from montessori.oracle import (
    apply_step,
    clip_gradients,
    example_gradients,
    is_finite,
    mean_delta,
    norm,
    restore,
    restored,
)
from montessori.parameters import trainable_parameters
from montessori.referenceset import ReferenceSets

METHODS = ["first_order", "anchored", "exact"]


def bits(tensors) -> list[bytes]:
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


# One step


def small_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # An odd number of elements, so that the ends of torch's vectorised loops are met too.
    return nn.Sequential(nn.Linear(17, 13), nn.LayerNorm(13), nn.Linear(13, 1)).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def two_groups(model: nn.Module, first: dict, second: dict) -> list[dict]:
    parameters = list(model.parameters())
    return [{"params": parameters[::2], **first}, {"params": parameters[1::2], **second}]


ADAM = (
    {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.7, 0.999), "eps": 1e-4, "weight_decay": 0.0},
)
SGD = ({"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.03, "momentum": 0.8, "dampening": 0.25})
UNDAMPED = ({"lr": 0.1, "momentum": 1.0}, {"lr": 0.03, "momentum": 1.0, "nesterov": True, "weight_decay": 0.1})
NESTEROV = (
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"lr": 0.03, "momentum": 0.5, "nesterov": True},
)
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, ADAM, 5),
    "adamw_after_one_step": (torch.optim.AdamW, ADAM, 1),
    "adam_l2": (torch.optim.Adam, ADAM, 5),
    "sgd": (torch.optim.SGD, SGD, 3),
    "sgd_first_step": (torch.optim.SGD, SGD, 0),
    "sgd_undamped": (torch.optim.SGD, UNDAMPED, 3),
    "nesterov": (torch.optim.SGD, NESTEROV, 3),
    "nesterov_first_step": (torch.optim.SGD, NESTEROV, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "options", "warm"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_gives_the_bits_of_the_real_optimizer(kind, options, warm, dtype):
    model = small_model(dtype)
    optimizer = kind(two_groups(model, *options), foreach=False)
    for step in range(warm):
        set_gradients(model, step)
        optimizer.step()
    ours = copy.deepcopy(model)
    state = from_copy(model, optimizer)
    set_gradients(model, 100)
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    before, moments = bits(ours.parameters()), state.digest()
    optimizer.step()
    apply_step(trainable_parameters(ours), state, grads)
    assert bits(ours.parameters()) == bits(model.parameters())
    assert bits(ours.parameters()) != before
    assert state.digest() == moments, "the optimizer state is not advanced"


def from_copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> AdamWState:
    """The optimizer's state on tensors of its own: a real step changes the optimizer's in place."""
    return AdamWState(
        {
            name: replace(entry, **{label: tensor.clone() for label, tensor in entry.tensors()})
            for name, entry in AdamWState.from_optimizer(model, optimizer).items()
        }
    )


@pytest.mark.parametrize(("kind", "options", "warm"), OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("count", [0, 3])
def test_the_mean_step_is_the_mean_of_single_steps(kind, options, warm, count):
    model = make_model("llama_tied")
    optimizer = kind(two_groups(model, *options))
    for seed in range(warm):
        set_gradients(model, seed)
        optimizer.step()
    state, parameters = AdamWState.from_optimizer(model, optimizer), trainable_parameters(model)
    pilots = examples(make_rows(count))
    mean = mean_delta(model, parameters, state, pilots, response_loss, None)
    steps = []
    with restored(parameters) as theta:
        for pilot in pilots or [None]:
            zero = dict.fromkeys(parameters)
            grads = example_gradients(model, parameters, pilot, response_loss)[0] if pilot else zero
            apply_step(parameters, state, grads)
            steps.append({name: parameter.detach() - theta[name] for name, parameter in parameters.items()})
            restore(parameters, theta)
    largest = 0.0
    for name, value in mean.items():
        want = torch.stack([step[name] for step in steps]).mean(0)
        # The subtraction rounds like the weights, which are below 2; the steps are below 1.
        assert (value - want).abs().max() <= 4 * torch.finfo(torch.float64).eps
        largest = max(largest, float(want.abs().max()))
    # SGD without momentum yet has no step without a gradient but decay.
    assert largest > 1e-4


def test_a_parameter_without_gradient_steps_as_with_gradient_zero():
    model = small_model(torch.float64)
    optimizer = torch.optim.AdamW(two_groups(model, *ADAM), foreach=False)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    ours, state = copy.deepcopy(model), from_copy(model, optimizer)
    set_gradients(model, 100)
    model[0].weight.grad.zero_()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()} | {"0.weight": None}
    optimizer.step()
    apply_step(trainable_parameters(ours), state, grads)
    assert bits(ours.parameters()) == bits(model.parameters())


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -0.0])
@pytest.mark.parametrize("fails", [False, True])
def test_restored_gives_the_same_bits_back_also_after_an_exception(value, fails):
    model = small_model(torch.float32)
    if value is not None:
        with torch.no_grad():
            model[0].weight[::2] = value
    parameters, before = trainable_parameters(model), bits(model.parameters())
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    try:
        with restored(parameters) as saved:
            for _ in range(2):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.3).add_(float("nan") if fails else 1.0)
                assert bits(model.parameters()) != before
                restore(parameters, saved)
                assert bits(model.parameters()) == before
            nn.init.ones_(model[2].weight)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert bits(model.parameters()) == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3000, 700), (7, 1), (4099,), (), (0, 4), (2, 3, 5)], ids=str)
def test_norms_are_those_of_float64(shape, dtype):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    # Summed in pairs, as torch.linalg.vector_norm is not.
    got, want = norm(tensor), tensor.double().square().sum().sqrt()
    assert got.dtype is torch.float64
    # Sums of a row's squares: as many roundings as it has values, of which torch's partial sums leave few.
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    torch.testing.assert_close(got, want, rtol=32 * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_told_from_what_is_large(dtype):
    largest = torch.finfo(dtype).max
    for values in ([], [0.0], [largest] * 4, [-largest, largest, -largest]):
        assert is_finite(torch.tensor(values, dtype=dtype))
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in range(3):
            values = torch.full((3, 5), largest, dtype=dtype)
            values[place, place] = value
            assert not is_finite(values)
    assert not is_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_norm", [0.01, 5.0, 1e3])
def test_clipping_is_torchs_by_global_norm(dtype, max_norm):
    model = small_model(dtype)
    set_gradients(model, 1)
    model[1].bias.grad = None
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    total = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    got = clip_gradients(grads, max_norm)
    for name, parameter in model.named_parameters():
        if grads[name] is None:
            assert got[name] is None
            continue
        # torch divides by ‖g‖ + 1e-6. Its norm of norms over some 250 elements, the quotient and the product
        # are rounded in `dtype`: 250 in a sum of squares halve under the root, in practice far fewer.
        allowed = parameter.grad.abs() * (1e-6 / total + 128 * torch.finfo(dtype).eps)
        assert torch.all((got[name] - parameter.grad).abs() <= allowed)
        assert torch.equal(got[name], grads[name]) == (max_norm > total)
    assert clip_gradients(grads, None) is grads


def test_gradients_of_an_example_are_those_of_a_plain_backward_pass():
    model = make_model("llama_tied")
    row = make_rows(1, seed=1)[0]
    example = next(examples_from_tokens([row], "row"))
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)
    got, loss = example_gradients(model.train(), trainable_parameters(model), example, response_loss)
    assert model.lm_head.weight.grad is kept
    assert model.training
    want = gradients(model.eval(), plain_loss(model, row))
    assert got.keys() == want.keys()
    for name, grad in want.items():
        # Two orders of summation over some 10^3 terms in float64.
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-14)
    assert loss == pytest.approx(float(plain_loss(model, row).detach()), rel=1e-13)


# The whole loop


def examples(rows) -> list:
    return list(examples_from_tokens(rows, "rows"))


def allowed_difference(loss: float, dtype: torch.dtype) -> float:
    """Of ΔL from two ways to evaluate a reference loss.

    ΔL is a difference of two losses, each off by some roundings of its logits and of itself.
    """
    return 16 * torch.finfo(dtype).eps * loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_exact_is_the_loop_that_a_careful_engineer_writes(dtype, max_grad_norm):
    model = make_model("llama_tied", dtype)
    optimizer = warm_optimizer(model, lr=1e-2)
    state = AdamWState.from_optimizer(model, optimizer)
    rows, references = make_rows(4, seed=1), {"a": make_rows(3, seed=2), "b": make_rows(2, seed=3)}
    sets = ReferenceSets({name: examples(part) for name, part in references.items()}, "example_mean", 64)
    before = bits(model.parameters())
    want = naive.optimised_naive_loop(model, state, examples(rows), sets, max_grad_norm=max_grad_norm)
    assert bits(model.parameters()) == before
    estimator = InfluenceEstimator(model, optimizer, references, method="exact", max_grad_norm=max_grad_norm)
    got = estimator.score(rows)
    # Clipped gradients differ by 1e-6 / ‖g‖ (torch's ε), which is less than 1e-6 of a step.
    clipping = 1e-6 * np.abs(want).max() if max_grad_norm else 0
    tolerance = allowed_difference(got.reference_loss.max(), dtype) + clipping
    np.testing.assert_allclose(got.influence, want, rtol=0, atol=tolerance)
    assert np.ptp(want, axis=0).min() > 50 * tolerance


def test_exact_is_the_loop_of_published_scripts_on_a_saved_checkpoint(tmp_path):
    model = make_model("llama_untied", torch.float32)
    optimizer = warm_optimizer(model, lr=1e-2)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    # Trainer's file: two groups, matrices with weight decay and then norms and biases without.
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    rows, references = make_rows(3, seed=1), make_rows(5, seed=2)
    want = naive.published_naive_loop(
        tmp_path, examples(rows), examples(references), max_length=16, reference_batch_size=2
    )
    got = InfluenceEstimator(model, str(tmp_path), references, method="exact").score(rows)
    tolerance = allowed_difference(got.reference_loss, torch.float32)
    np.testing.assert_allclose(got.influence, want, rtol=0, atol=tolerance)
    assert np.ptp(want) > 50 * tolerance


def save_tokenizer(directory) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)


def test_naive_loops_refuse_what_they_cannot_run():
    model = make_model("llama_tied")
    warm = AdamWState.from_optimizer(model, warm_optimizer(model))
    coupled = AdamWState({n: replace(e, step=replace(e.step, decoupled=False)) for n, e in warm.items()})
    with pytest.raises(ArgumentError, match="expected the state of AdamW, got AdamWStep"):
        naive.make_adamw(model, coupled)


@pytest.mark.parametrize("method", METHODS)
def test_scoring_leaves_model_and_optimizer_as_they_were(method):
    model = make_model("llama_tied", torch.float32).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    optimizer = warm_optimizer(model)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)

    def state():
        parameters = [(p.data_ptr(), p.requires_grad, p.grad) for p in model.parameters()]
        return parameters, [module.training for module in model.modules()]

    weights, before = bits(model.state_dict().values()), state()
    moments = AdamWState.from_optimizer(model, optimizer).digest()
    InfluenceEstimator(model, optimizer, make_rows(3), method=method, pilot=2).score(make_rows(4, seed=1))
    assert bits(model.state_dict().values()) == weights
    assert AdamWState.from_optimizer(model, optimizer).digest() == moments
    for (pointer, flag, grad), (pointer_after, flag_after, grad_after) in zip(before[0], state()[0], strict=True):
        assert (pointer, flag) == (pointer_after, flag_after)
        assert grad is grad_after
        assert grad is None or torch.all(grad == 1)
    assert before[1] == state()[1]


class Branching(nn.Module):
    """A layer that only rows with a token of 40 or more reach: absent for the others, and it has a drift."""

    def __init__(self):
        super().__init__()
        self.embed, self.extra = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids):
        h, reached = self.embed(input_ids), (input_ids >= 40).any(1)
        if reached.any():
            h = h + self.extra(h) * reached[:, None, None]
        return SimpleNamespace(logits=self.head(torch.tanh(h)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gpt_oss", "branching"])
def test_clipped_scores_are_those_of_a_loop_with_clipping(monkeypatch, name, method):
    torch.manual_seed(0)
    model = Branching().double() if name == "branching" else make_model(name)
    optimizer = warm_optimizer(model)
    candidates, references = make_rows(5, seed=1), make_rows(3, seed=2)
    if name == "branching":
        candidates = [{key: [min(token, 39) for token in ids] for key, ids in row.items()} for row in candidates]
        references = [{key: [*ids, 50] for key, ids in row.items()} for row in references]
    unclipped = slow_influence(model, optimizer, candidates, references, method, pilot=range(5))
    limit = clip_loop(monkeypatch, model, candidates)
    want = np.array(slow_influence(model, optimizer, candidates, references, method, pilot=range(5)))
    got = InfluenceEstimator(model, optimizer, references, method=method, pilot=5, max_grad_norm=limit).score(
        candidates, batch_tokens=40
    )
    # As tests/test_estimator.py: two orders of summation in float64.
    np.testing.assert_allclose(got.influence, want, rtol=1e-9)
    assert np.abs(want - unclipped).max() > 1e-3 * np.abs(want).max()
