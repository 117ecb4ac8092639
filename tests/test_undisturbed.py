"""A live model that is interrupted while it is scored, and one that several threads use."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from support import make_model, make_rows, warm_optimizer

from montessori import InfluenceEstimator
from montessori.errors import ModelError
from montessori.live import to_the_end
from montessori.losses import response_loss
from montessori.shared import Shared

METHODS = ["first_order", "anchored", "exact"]
INTERRUPTS = 25


def estimator(model, optimizer, seed=2, **settings):
    return InfluenceEstimator(model, optimizer, make_rows(3, seed=seed), **settings)


def arrangement(model) -> list:
    """All of a model that is not a value."""
    modules = [
        (name, module.training, "forward" in vars(module), [len(v) for k, v in vars(module).items() if "_hooks" in k])
        for name, module in model.named_modules()
    ]
    return [modules, [(p.requires_grad, p.grad is None) for p in model.parameters()]]


class Interrupt:
    """Ctrl-C at the n-th call or return of a function of the package, or of contextlib between its parts."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame, event, argument) -> None:
        file = frame.f_code.co_filename
        if event in ("call", "return") and ("/montessori/" in file or file.endswith("contextlib.py")):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def interrupted(work, at: int) -> bool:
    """Whether the interrupt came before the end of `work`."""
    sys.setprofile(Interrupt(at))
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(method):
    model = make_model("llama_tied").train()
    optimizer = warm_optimizer(model)
    candidates, weights = make_rows(3, seed=1), [p.detach().clone() for p in model.parameters()]
    want = estimator(model, optimizer, method=method).score(candidates).influence
    found = estimator(model, optimizer, method=method)
    counted = Interrupt(-1)
    sys.setprofile(counted)
    found.score(candidates)
    sys.setprofile(None)
    before, events = arrangement(model), -1 - counted.left
    drawn, came = random.Random(0), 0
    for _ in range(INTERRUPTS):
        found = estimator(model, optimizer, method=method)
        at = drawn.randrange(1, events)
        came += interrupted(lambda found=found: found.score(candidates), at)
        assert arrangement(model) == before, at
        assert not torch._C._len_torch_function_stack(), at
        assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), weights, strict=True)), at
    # Python drops what is raised while it closes a generator.
    assert came > 0.8 * INTERRUPTS
    np.testing.assert_array_equal(found.score(candidates).influence, want)


def test_work_that_is_interrupted_is_done_whole_before_the_interrupt():
    done = []

    def work():
        done.append(len(done))
        if len(done) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_the_end(work)
    assert done == [0, 1, 2]


def test_an_interrupt_within_a_module_leaves_nothing_that_watches_calls(monkeypatch):
    """Hooks after a forward pass are not called then."""
    model = make_model("gpt2")
    found = estimator(model, warm_optimizer(model))
    found.prepare(make_rows(4, seed=1))

    embedding = torch.nn.functional.embedding

    def interrupted(*given, **more):
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return embedding(*given, **more)

    monkeypatch.setattr(torch.nn.functional, "embedding", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.score(make_rows(4, seed=1))
    monkeypatch.undo()
    assert not torch._C._len_torch_function_stack()


def test_what_threads_share_is_set_back_by_the_last_to_leave():
    seen = ["off"]

    @contextmanager
    def switched():
        seen.append("on")
        yield
        seen.append("off")

    shared = Shared(switched)
    for _ in range(2):
        first, second = shared.on(), shared.on()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert seen[-1] == "on"
        second.__exit__(None, None, None)
    assert seen == ["off", "on", "off", "on", "off"]


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_score_one_model_wait_for_each_other(method):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    rows = [make_rows(4, seed=seed) for seed in range(6)]
    shared, other = (estimator(model, optimizer, seed, method=method) for seed in (2, 3))
    want = [(shared.score(some).influence, other.score(some).influence) for some in rows]
    shared, other = (estimator(model, optimizer, seed, method=method) for seed in (2, 3))
    with ThreadPoolExecutor(4) as pool:
        pairs = [(pool.submit(shared.score, some), pool.submit(other.score, some)) for some in rows]
        for expected, found in zip(want, pairs, strict=True):
            for influence, future in zip(expected, found, strict=True):
                np.testing.assert_array_equal(future.result().influence, influence)


@pytest.mark.parametrize("method", METHODS)
def test_training_while_the_model_is_scored_is_noticed(method):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    training = False

    def loss(model, batch):
        losses = response_loss(model, batch)
        if training:
            with torch.no_grad():
                model.model.norm.weight.mul_(1.01)
        return losses

    found = estimator(model, optimizer, method=method, loss_fn=loss, reference_loss_fn=loss)
    candidates = make_rows(3, seed=1)
    found.score(candidates)
    training = True
    with pytest.raises(ModelError, match=r"model\.norm\.weight was written while the model was scored"):
        found.score(candidates)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_of_several_calls_have_one_anchor(size):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    rows = make_rows(6, seed=1)
    whole = estimator(model, optimizer, pilot=3).score(rows).influence
    found = estimator(model, optimizer, pilot=3)
    parts = [found.score(rows[i : i + size], pilot_rows=rows).influence for i in range(0, len(rows), size)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9)
    apart = np.concatenate([found.score(rows[i : i + size]).influence for i in range(0, len(rows), size)])
    assert np.abs(apart - whole).max() > 1e-6 * np.abs(whole).max()


@pytest.mark.parametrize("method", ["anchored", "exact"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_model_that_rewrites_its_weights_for_evaluation_is_refused(method, asked_before):
    """RWKV divides the output weights of its later layers in the first forward pass in eval mode."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=3, context_length=64, rescale_every=2
    )
    model = transformers.RwkvForCausalLM(config).double().train()
    estimator = InfluenceEstimator(model, warm_optimizer(model), make_rows(2, seed=2), method=method)
    with pytest.raises(ModelError, match=r"attention.output.weight was written .* by its own forward pass"):
        _ = estimator.coverage if asked_before else estimator.score(make_rows(2, seed=1))
