"""Models as training programs leave them in memory: with forwards replaced, and inside wrappers."""

from __future__ import annotations

import copy
import functools
import types

import numpy as np
import pytest
import torch
from support import make_model, make_rows, warm_optimizer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from montessori import InfluenceEstimator
from montessori.errors import ArgumentError, ModelError
from montessori.live import unwrapped
from montessori.optim_state import AdamWState

CANDIDATES = make_rows(5, seed=1)
METHODS = ["first_order", "anchored", "exact"]


def influence(model, optimizer, candidates=CANDIDATES, **settings):
    return InfluenceEstimator(model, optimizer, make_rows(3, seed=2), **settings).score(candidates).influence


def as_method(model):
    """As TRL's trainer replaces the forward of the model that it trains."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(self, *arguments, **options):
        return inner(*arguments, **options)

    model.forward = types.MethodType(forward, model)


def as_closure(model):
    inner = model.forward
    model.forward = lambda *arguments, **options: inner(*arguments, **options)


def as_partial(model):
    model.forward = functools.partial(type(model).forward, model)


def around_a_layer(model):
    as_closure(model.model.layers[0].mlp)


def by_a_function_that_holds_itself(model):
    inner = model.forward

    def forward(*arguments, again=True, **options):
        return forward(*arguments, again=False, **options) if again else inner(*arguments, **options)

    model.forward = forward


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "wrap",
    [as_method, as_closure, as_partial, around_a_layer, by_a_function_that_holds_itself],
    ids=lambda f: f.__name__,
)
def test_a_wrapped_forward_of_a_narrow_model_changes_no_score(wrap, method):
    model = make_model("llama_tied", torch.bfloat16)
    optimizer = warm_optimizer(model)
    want = influence(model, optimizer, method=method)
    assert want.any()
    wrap(model)
    kept = [module.forward for module in model.modules()]
    np.testing.assert_array_equal(influence(model, optimizer, method=method), want)
    assert [module.forward for module in model.modules()] == kept
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("holder", ["whole model", "layer"])
def test_a_copy_that_would_compute_with_the_weights_of_the_original_is_refused(holder):
    model = make_model("llama_tied", torch.bfloat16)
    optimizer = warm_optimizer(model)
    wrapped = model if holder == "whole model" else model.model.layers[0].mlp
    # Out of reach for a copy: the original is an entry of a dict.
    table = {"forward": wrapped.forward}
    wrapped.forward = lambda *arguments, **options: table["forward"](*arguments, **options)
    with pytest.raises(ModelError, match="pass the model without the wrapper") as refusal:
        influence(model, optimizer)
    assert "\n" not in str(refusal.value)
    assert all(parameter.grad is None for parameter in model.parameters())
    narrow = {"method": "first_order", "reference_dtype": "model"}
    assert influence(model, optimizer, **narrow).any()


class Mask(nn.Module):
    """Holds which rows of a weight train, in the weight's own dtype, and zeroes the gradient of the others."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("rows", (torch.arange(len(weight)) % 2).to(weight)[:, None])

    def hook(self, grad):
        return grad * self.rows


def freeze_a_matrix(model):
    model.model.layers[0].mlp.up_proj.weight.register_hook(torch.zeros_like)


def freeze_rows_by_a_mask_of_the_model(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    mask = model.mask = Mask(weight)
    # Multiplied as matrices too, which takes one dtype.
    weight.register_hook(lambda grad: torch.diag(mask.rows[:, 0]) @ mask.hook(grad))


def freeze_rows_in_place(model):
    def zero(grad):
        grad[::2] = 0

    model.model.layers[0].mlp.up_proj.weight.register_hook(zero)


def return_a_narrow_gradient(model):
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: torch.zeros_like(grad, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "hang",
    [freeze_a_matrix, freeze_rows_by_a_mask_of_the_model, freeze_rows_in_place, return_a_narrow_gradient],
    ids=lambda f: f.__name__,
)
def test_hooks_on_parameters_of_a_narrow_model_act_on_its_copy(hang):
    """As on a float32 model of the same values and moments, bit for bit."""
    narrow = make_model("llama_tied", torch.bfloat16)
    state = AdamWState.from_optimizer(narrow, warm_optimizer(narrow))
    wide = copy.deepcopy(narrow).float()
    free = influence(narrow, state, method="exact")
    hang(narrow)
    if hang is not return_a_narrow_gradient:
        hang(wide)
    else:
        freeze_a_matrix(wide)
    got = influence(narrow, state, method="exact")
    np.testing.assert_array_equal(got, influence(wide, state, method="exact"))
    assert (got != free).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_is_hung_between_two_calls_is_seen(method):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model)
    found = InfluenceEstimator(model, optimizer, make_rows(3, seed=2), method=method)
    found.score(CANDIDATES)
    freeze_a_matrix(model)
    np.testing.assert_array_equal(found.score(CANDIDATES).influence, influence(model, optimizer, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel_wrappers_are_taken_off(method, tmp_path):
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    want = influence(model, optimizer, method=method)
    np.testing.assert_array_equal(influence(nn.DataParallel(model), optimizer, method=method), want)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        np.testing.assert_array_equal(influence(wrapped, optimizer, method=method), want)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("version", [1, 2])
def test_shards_of_weights_are_refused(version, tmp_path):
    model = make_model("llama_tied", torch.float32)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if version == 1:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            fully_shard(model)
        with pytest.raises(ModelError, match="is a shard of a weight: expected whole weights"):
            InfluenceEstimator(model, torch.optim.AdamW(model.parameters()), make_rows(3, seed=2))
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_models_run_as_they_were_written():
    model = make_model("llama_tied", torch.float32)
    optimizer = warm_optimizer(model)
    want = influence(model, optimizer)
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    np.testing.assert_array_equal(influence(compiled, optimizer), want)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    np.testing.assert_array_equal(influence(model, optimizer), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_narrow_model_keep_their_rules(dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama_tied", dtype), config)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapters} == {torch.float32}
    found = InfluenceEstimator(model, warm_optimizer(model), make_rows(3, seed=2))
    assert found.coverage == {"linear": sum(parameter.numel() for parameter in adapters)}
    assert found.audit(CANDIDATES, k=4).agreement["reference"].pearson > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "smollm2-135m"}, "model: expected a torch.nn.Module, got str"),
        ({"tokenizer": "smollm2-135m"}, "tokenizer: expected a tokenizer of transformers, got str"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1': expected a positive number"),
        ({"sample": "0.5"}, "sample='0.5': expected a share"),
        ({"pilot": "8"}, "pilot='8': expected a number of examples"),
        ({"pilot": True}, "pilot=True: expected a number of examples"),
        ({"reference_batch_tokens": 0}, "reference_batch_tokens=0: expected at least 1"),
        ({"reference_batch_tokens": "9"}, "reference_batch_tokens='9': expected a number of tokens"),
        ({"reference": {1: CANDIDATES, "1": CANDIDATES}}, "expected names of sets as text, got 1, '1'"),
        ({"invalid_rows": "drop"}, "invalid_rows='drop': expected one of error, skip"),
    ],
)
def test_what_is_not_what_an_argument_takes_is_named(change, message):
    model = make_model("llama_tied")
    arguments = {"model": model, "optimizer": warm_optimizer(model), "reference": make_rows(3, seed=2)} | change
    with pytest.raises(ArgumentError, match=message.replace("(", "\\(")):
        InfluenceEstimator(**arguments)


def test_more_tokens_than_a_model_has_positions_for_are_refused():
    model = make_model("gpt2")
    limit = model.config.n_positions
    with pytest.raises(ArgumentError, match=f"max_length={limit + 1}: expected at most {limit}, the positions that"):
        InfluenceEstimator(model, warm_optimizer(model), CANDIDATES, max_length=limit + 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_adapter_is_told_from_a_loss_that_nothing_trains(method):
    model = make_model("llama_lora")
    optimizer = warm_optimizer(model)
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"an adapter is merged .* call model\.unmerge_adapter\(\)"):
        influence(model, optimizer, method=method)
    model.unmerge_adapter()
    assert influence(model, optimizer, method=method).any()
