"""A small model to be made awkward, its gradients as capture gives them and as autograd does."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from montessori.batching import Example, collate
from montessori.capture import Capture
from montessori.coverage import verified_plan
from montessori.errors import FallbackWarning
from montessori.uses import example_gradient

VOCABULARY, WIDTH, PADDING = 12, 6, 3


class Model(nn.Module):
    """Embedding, `body(model, h, ids)`, head; the body uses `middle` in its own way. ids [B, T]."""

    def __init__(self, body=lambda model, h, ids: model.middle(h), middle=None, embed=None, tied=False):
        super().__init__()
        self.embed = embed or nn.Embedding(VOCABULARY, WIDTH)
        self.middle = middle or nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.body = body
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self, self.embed(ids), ids)))


def mean_loss(model: nn.Module, batch) -> torch.Tensor:
    targets = batch.labels[:, 1:]
    token_loss = F.cross_entropy(model(batch.input_ids)[:, :-1].transpose(1, 2), targets, reduction="none")
    return token_loss.sum(1) / (targets != -100).sum(1)


def example(ids: list[int], index: int = 0) -> Example:
    return Example(torch.tensor(ids), torch.tensor([-100, *ids[1:]]), index)


# Different lengths, a repeated token, the padding token in the text, and one with a single label.
EXAMPLES = [example([5, 1, 3, 5, 2, 7]), example([3, 8, 4], 1), example([0, 11], 2), example([9, 3, 3, 10, 6, 1, 2], 3)]


class Collect:
    """A sink that keeps everything, and objects when a parameter comes twice."""

    def __init__(self) -> None:
        self.uses: dict = {}

    def use(self, name, use):
        assert name not in self.uses
        self.uses[name] = use

    def absent(self, name):
        self.use(name, None)


def captured(model, plan, examples) -> list[dict]:
    """Per example, every parameter's gradient as capture gives it, zeros where it is absent."""
    capture, result = Capture(model, plan), []
    with capture.installed():
        for group in [[one] for one in examples] if plan.per_example else [examples]:
            sink = Collect()
            capture.run(collate(group), mean_loss, sink)
            assert sink.uses.keys() == plan.trainable.keys()
            for position in range(len(group)):
                result.append({})
                for name, use in sink.uses.items():
                    zero = torch.zeros_like(plan.trainable[name])
                    result[-1][name] = zero if use is None else example_gradient(use, position, zero.shape)
    return result


def plain(model, one: Example) -> dict:
    """Gradients of one example by an ordinary backward pass, zeros where there is none."""
    mean_loss(model, collate([one])).sum().backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trainable.items()}
    model.zero_grad()
    return grads


def assert_exact(model, plan, examples=EXAMPLES) -> None:
    for one, got in zip(examples, captured(model, plan, examples), strict=True):
        for name, want in plain(model, one).items():
            # Two orders of summation in float64 over some hundred terms of a gradient of norm 0.01 to 1.
            torch.testing.assert_close(got[name], want, rtol=1e-11, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}")


def build(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_captured_in_batches(model) -> dict[str, int]:
    """Every gradient is autograd's, none of them by the fallback; the scalars per rule, which add up to all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        plan = verified_plan(model, EXAMPLES[:2], mean_loss)
    assert_exact(model, plan)
    assert "autograd" not in plan.coverage()
    assert sum(plan.coverage().values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return plan.coverage()
