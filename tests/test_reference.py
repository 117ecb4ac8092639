"""The specification against statements made without it: torch's optimizers, autograd, exact algebra."""

from __future__ import annotations

import pytest
import torch

from montessori import AdamWStep, SGDStep, reference

EPS = torch.finfo(torch.float64).eps


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_change(before: torch.Tensor, delta: torch.Tensor, after: torch.Tensor) -> None:
    """`before + delta` is `after`, element by element.

    A step is some ten roundings of terms no larger than |θ| + |Δ|, and torch does them in another order.
    """
    error = (before + delta - after).abs()
    assert torch.all(error <= 16 * EPS * (before.abs() + delta.abs()))
    assert delta.abs().max() > 1e-3, "the step is too small for the comparison to mean something"


ADAM_GROUPS = [
    {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    {"lr": 0.2, "betas": (0.0, 0.5), "eps": 1e-6, "weight_decay": -0.1},
]


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_adamw_delta_is_the_change_that_torch_makes_in_every_group_and_at_every_step(decoupled):
    groups = [{"params": [random(4, 3, seed=i)], **options} for i, options in enumerate(ADAM_GROUPS)]
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups)
    moments = [[torch.zeros(4, 3, dtype=torch.float64)] * 2 for _ in groups]
    for t in range(1, 6):
        before = [group["params"][0].clone() for group in groups]
        for i, group in enumerate(groups):
            group["params"][0].grad = random(4, 3, seed=100 * t + i)
        optimizer.step()
        for i, (group, options) in enumerate(zip(groups, ADAM_GROUPS, strict=True)):
            beta1, beta2 = options["betas"]
            step = AdamWStep(
                lr=options["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=options["eps"],
                weight_decay=options["weight_decay"],
                step=t,
                decoupled=decoupled,
            )
            parameter = group["params"][0]
            delta = reference.adamw_delta(parameter.grad, *moments[i], before[i], step)
            assert_change(before[i], delta, parameter)
            moments[i] = [optimizer.state[parameter][key].clone() for key in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 1.0},
        {"momentum": 1.5, "weight_decay": 0.3, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.3, "nesterov": True},
        {"momentum": 0.5, "dampening": -0.5, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_delta_is_the_change_that_torch_makes_at_the_first_step_and_later(options):
    parameter = random(5, seed=1)
    optimizer = torch.optim.SGD([parameter], lr=0.1, **options)
    buffer = None
    for t in range(1, 5):
        before = parameter.clone()
        parameter.grad = random(5, seed=10 + t)
        optimizer.step()
        step = SGDStep(lr=0.1, step=t, **options)
        assert_change(before, reference.sgd_delta(parameter.grad, buffer, before, step), parameter)
        if "momentum" in options:
            buffer = optimizer.state[parameter]["momentum_buffer"].clone()


def test_a_momentum_buffer_is_not_used_at_the_first_step():
    grad, param = random(3, seed=1), random(3, seed=2)
    step = SGDStep(lr=0.1, momentum=0.9, step=1)
    assert torch.equal(
        reference.sgd_delta(grad, torch.full_like(grad, 7.0), param, step),
        reference.sgd_delta(grad, None, param, step),
    )


def test_delta_follows_the_kind_of_step_and_refuses_adam_without_moments():
    grad, exp_avg, param = (random(3, seed=seed) for seed in range(3))
    exp_avg_sq = random(3, seed=3).square()
    adam, sgd = AdamWStep(lr=0.1, step=4), SGDStep(lr=0.1, momentum=0.9, step=4)
    assert torch.equal(
        reference.delta(grad, exp_avg, exp_avg_sq, param, adam),
        reference.adamw_delta(grad, exp_avg, exp_avg_sq, param, adam),
    )
    assert torch.equal(reference.delta(grad, exp_avg, None, param, sgd), reference.sgd_delta(grad, exp_avg, param, sgd))
    for moments in ((None, exp_avg_sq), (exp_avg, None)):
        with pytest.raises(TypeError, match="needs exp_avg and exp_avg_sq, got None"):
            reference.delta(grad, *moments, param, adam)


@pytest.mark.parametrize("ratio", [0.1, 0.999, 1.0, 3.0])
def test_clip_factor_is_what_torch_multiplies_by(ratio):
    grad = random(7, seed=1)
    parameter = torch.nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad.clone()
    max_norm = ratio * float(grad.norm())
    torch.nn.utils.clip_grad_norm_([parameter], max_norm)
    got = grad * reference.clip_factor(grad.norm(), max_norm)
    # torch divides by ‖g‖ + 1e-6, a relative difference of at most 1e-6 / ‖g‖, and rounds a few times.
    allowed = grad.abs() * (1e-6 / grad.norm() + 4 * EPS)
    assert torch.all((got - parameter.grad).abs() <= allowed)
    assert (ratio < 1) == bool(got.norm() < 0.9999 * grad.norm())


def test_clip_factor_of_a_zero_gradient_is_one():
    assert reference.clip_factor(torch.tensor(0.0), 1.0) == 1


class Quadratic:
    """L(θ) = ½ θᵀAθ + bᵀθ, of which everything is known."""

    def __init__(self) -> None:
        root = random(6, 6, seed=1)
        self.a, self.b, self.theta = root @ root.T, random(6, seed=2), random(6, seed=3)

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        return 0.5 * theta @ self.a @ theta + self.b @ theta

    def gradient(self, theta: torch.Tensor) -> torch.Tensor:
        return self.a @ theta + self.b

    def bend(self, step: torch.Tensor) -> torch.Tensor:
        return 0.5 * step @ self.a @ step


def test_influence_is_positive_when_the_step_lowers_the_reference_loss():
    problem = Quadratic()
    q = problem.gradient(problem.theta)
    for gradient, sign in ((q, 1), (-q, -1)):
        # An example whose gradient is that of the reference helps; its opposite harms.
        step = reference.sgd_delta(gradient, None, problem.theta, SGDStep(lr=1e-4))
        real = reference.influence(problem.loss(problem.theta + step), problem.loss(problem.theta))
        predicted = -reference.first_order(q[None], step)[0]
        assert real * sign > 0
        assert predicted * sign > 0


def test_first_order_misses_exactly_the_bend_of_a_quadratic():
    problem, step = Quadratic(), 0.1 * random(6, seed=4)
    real = problem.loss(problem.theta + step) - problem.loss(problem.theta)
    predicted = reference.first_order(problem.gradient(problem.theta)[None], step)[0]
    torch.testing.assert_close(real - predicted, problem.bend(step), rtol=1e-12, atol=1e-13)


def test_anchored_misses_exactly_the_bend_beyond_the_anchor():
    problem, anchor = Quadratic(), 0.1 * random(6, seed=5)
    at_anchor = problem.theta + anchor
    q = problem.gradient(at_anchor)[None]
    for step in (anchor + 0.01 * random(6, seed=6), anchor):
        predicted = reference.anchored(
            reference.first_order(q, step)[0],
            reference.first_order(q, anchor)[0],
            problem.loss(at_anchor),
            problem.loss(problem.theta),
        )
        real = problem.loss(problem.theta + step) - problem.loss(problem.theta)
        torch.testing.assert_close(real - predicted, problem.bend(step - anchor), rtol=1e-9, atol=1e-13)


def test_first_order_keeps_reference_sets_apart():
    q, step = random(3, 4, 2, seed=1), random(4, 2, seed=2)
    want = [sum(q[k, i, j] * step[i, j] for i in range(4) for j in range(2)) for k in range(3)]
    torch.testing.assert_close(reference.first_order(q, step), torch.stack(want), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_linear_gradient_is_autograds(tokens):
    weight = random(5, 3, seed=1).requires_grad_()
    x, dy = random(tokens, 3, seed=2), random(tokens, 5, seed=3)
    (want,) = torch.autograd.grad(torch.nn.functional.linear(x, weight), weight, dy)
    torch.testing.assert_close(reference.linear_gradient(x, dy), want, rtol=1e-13, atol=1e-13)


def test_embedding_gradient_is_autograds_with_repeated_ids():
    table = random(6, 3, seed=1).requires_grad_()
    ids, dy = torch.tensor([4, 0, 4, 5, 4]), random(5, 3, seed=2)
    (want,) = torch.autograd.grad(torch.nn.functional.embedding(ids, table), table, dy)
    torch.testing.assert_close(reference.embedding_gradient(ids, dy, 6), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("touched", [[], [2], [0, 3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_sparse_rows_is_the_score_of_the_whole_table(touched):
    q, param, exp_avg, grad = (random(5, 3, seed=seed) for seed in range(4))
    exp_avg_sq = random(5, 3, seed=4).square()
    untouched = [row for row in range(5) if row not in touched]
    grad[untouched] = 0
    step = AdamWStep(lr=0.1, weight_decay=0.1, step=3)

    def score(gradient: torch.Tensor, rows: list[int]) -> torch.Tensor:
        state = (tensor[rows] for tensor in (gradient, exp_avg, exp_avg_sq, param))
        return reference.first_order(q[None, rows], reference.adamw_delta(*state, step))

    zero, everything = torch.zeros_like(grad), list(range(5))
    got = reference.sparse_rows(score(zero, everything), score(grad, touched), score(zero, touched))
    torch.testing.assert_close(got, score(grad, everything), rtol=1e-12, atol=1e-14)
    assert score(zero, everything).abs() > 1e-3, "C0 must matter"
