"""Optimizer state by name: from live optimizers, from user tensors, checks, overrides, files, digests."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from montessori import optim_state
from montessori.errors import ArgumentError, StateError
from montessori.optim_state import AdamWState, ParameterState
from montessori.steps import AdamWStep, SGDStep


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=tied)).eval()


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input_ids = torch.randint(0, 64, (2, 8), generator=generator)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def stepped_adamw(model: nn.Module, **options) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})
    take_steps(model, optimizer)
    return optimizer


def make_state(model: nn.Module, **changes) -> dict[str, ParameterState]:
    step = AdamWStep(lr=1e-3, step=3)
    return {
        name: ParameterState(step, torch.zeros_like(parameter), torch.zeros_like(parameter))
        for name, parameter in model.named_parameters()
    } | changes


def assert_same(first: AdamWState, second: AdamWState) -> None:
    assert list(first) == list(second)
    for name, state in first.items():
        assert state.step == second[name].step
        for label in ("exp_avg", "exp_avg_sq"):
            one, other = getattr(state, label), getattr(second[name], label)
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# from_optimizer


def test_adamw_state_is_referenced_by_name_in_model_order():
    model = tiny_llama()
    optimizer = stepped_adamw(model, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    state = AdamWState.from_optimizer(model, optimizer)
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert len(state) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        saved = optimizer.state[parameter]
        assert state[name].step == AdamWStep(1e-3, 0.8, 0.95, 1e-6, 0.1, step=3, decoupled=True)
        assert state[name].exp_avg.data_ptr() == saved["exp_avg"].data_ptr()
        assert state[name].exp_avg_sq.data_ptr() == saved["exp_avg_sq"].data_ptr()
        assert not state[name].exp_avg.requires_grad
    state.validate(model)


def test_hyperparameters_are_per_group_and_lr_may_be_a_tensor():
    model = tiny_llama()
    parameters = list(model.parameters())
    groups = [{"params": parameters[3:], "lr": torch.tensor(0.25), "weight_decay": 0.5}, {"params": parameters[:3]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    take_steps(model, optimizer)
    steps = [state.step for state in AdamWState.from_optimizer(model, optimizer).values()]
    assert all(step.lr == 1e-3 and step.weight_decay == 0.0 for step in steps[:3])
    assert all(step.lr == 0.25 and step.weight_decay == 0.5 for step in steps[3:])


@pytest.mark.parametrize(("options", "decoupled"), [({}, False), ({"decoupled_weight_decay": True}, True)])
def test_adam_is_coupled_unless_its_group_says_otherwise(options, decoupled):
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1, **options)
    take_steps(model, optimizer, steps=1)
    state = AdamWState.from_optimizer(model, optimizer)
    assert {entry.step for entry in state.values()} == {AdamWStep(1e-3, weight_decay=0.1, step=2, decoupled=decoupled)}


def test_sgd_without_momentum_needs_no_state():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    for _ in range(2):
        state = AdamWState.from_optimizer(model, optimizer)
        state.validate(model)
        assert {entry.step for entry in state.values()} == {SGDStep(0.1, weight_decay=0.01, step=1)}
        assert all(entry.exp_avg is None and entry.exp_avg_sq is None for entry in state.values())
        take_steps(model, optimizer, steps=1)


def test_sgd_momentum_buffer_is_exp_avg_and_decides_the_step():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    fresh = AdamWState.from_optimizer(model, optimizer)
    fresh.validate(model)
    assert all(entry.step.step == 1 and entry.exp_avg is None for entry in fresh.values())
    take_steps(model, optimizer, steps=1)
    state = AdamWState.from_optimizer(model, optimizer)
    state.validate(model)
    for name, parameter in model.named_parameters():
        assert state[name].step == SGDStep(0.1, momentum=0.9, nesterov=True, step=2)
        assert torch.equal(state[name].exp_avg, optimizer.state[parameter]["momentum_buffer"])


def test_accelerated_optimizer_is_unwrapped():
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    take_steps(model, optimizer)
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    assert_same(AdamWState.from_optimizer(model, optimizer), AdamWState.from_optimizer(model, optimizer.optimizer))


def test_a_tied_parameter_stands_once_under_its_first_name():
    model = tiny_llama(tied=True)
    state = AdamWState.from_optimizer(model, stepped_adamw(model))
    assert "model.embed_tokens.weight" in state
    assert "lm_head.weight" not in state


def test_frozen_parameters_take_no_part():
    model = tiny_llama()
    optimizer = stepped_adamw(model)
    model.lm_head.weight.requires_grad_(False)
    state = AdamWState.from_optimizer(model, optimizer)
    assert "lm_head.weight" not in state
    state.validate(model)


class ScaledAdamW(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.RAdam, ScaledAdamW])
def test_another_optimizer_is_refused(kind):
    model = tiny_llama()
    with pytest.raises(StateError) as error:
        AdamWState.from_optimizer(model, kind(model.parameters()))
    supported = "torch.optim.AdamW, Adam and SGD, and Adam and AdamW of bitsandbytes and torchao"
    expected = f"unknown optimizer {kind.__name__}: supported are {supported}, one or a list of them"
    assert one_line(error) == f"{expected}; a step of another kind cannot be scored"


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_unsupported_options_are_refused(option):
    model = tiny_llama()
    optimizer = stepped_adamw(model)
    optimizer.param_groups[0][option] = True
    with pytest.raises(StateError, match=f"{option}=True is not supported"):
        AdamWState.from_optimizer(model, optimizer)


def test_second_moments_of_amsgrad_are_refused_as_amsgrad():
    model = tiny_llama()
    with pytest.raises(StateError, match="amsgrad=True is not supported"):
        AdamWState.from_optimizer(model, stepped_adamw(model, amsgrad=True))


def test_optimizer_of_another_model_is_refused():
    model = tiny_llama()
    with pytest.raises(StateError, match="are not in the model"):
        AdamWState.from_optimizer(model, stepped_adamw(tiny_llama()))


def test_optimizer_of_part_of_the_model_is_refused():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.model.parameters())
    take_steps(model, optimizer)
    with pytest.raises(StateError, match=r"missing for trainable lm_head.weight"):
        AdamWState.from_optimizer(model, optimizer)


def test_hyperparameters_out_of_range_name_the_parameter():
    model = tiny_llama()
    optimizer = stepped_adamw(model)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(StateError, match=r"model.embed_tokens.weight: lr=nan"):
        AdamWState.from_optimizer(model, optimizer)


# user tensors and validate


def test_state_from_user_tensors():
    model = tiny_llama()
    state = AdamWState(make_state(model))
    state.validate(model)
    assert repr(state) == "AdamWState(21 parameters, step 3)"
    with pytest.raises(TypeError):
        state["lm_head.weight"] = None
    with pytest.raises(ArgumentError, match="expected a mapping from parameter name to ParameterState"):
        AdamWState({"lm_head.weight": torch.zeros(64, 16)})


def test_fresh_optimizer_is_an_error():
    model = tiny_llama()
    state = AdamWState.from_optimizer(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(StateError, match=r"model.embed_tokens.weight, .* and 18 more has no moments \(step 0"):
        state.validate(model)


def test_parameter_that_never_got_a_gradient_is_named():
    model = tiny_llama()
    model.unused = nn.Parameter(torch.zeros(3))
    state = AdamWState.from_optimizer(model, stepped_adamw(model))
    with pytest.raises(StateError, match=r"state of unused has no moments \(step 0"):
        state.validate(model)


def damaged(value: float) -> torch.Tensor:
    tensor = torch.zeros(64, 16)
    tensor[5, 7] = value
    return tensor


STEP = AdamWStep(lr=1e-3, step=3)
ZEROS = torch.zeros(64, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ParameterState(STEP, ZEROS[:32], ZEROS), r"exp_avg of lm_head.weight: .* got \[32, 16\]"),
        (ParameterState(STEP, ZEROS, ZEROS.T), r"exp_avg_sq of lm_head.weight: expected .* another model"),
        (ParameterState(AdamWStep(lr=1e-3, step=1), ZEROS, ZEROS), r"lm_head.weight has no moments \(step 0"),
        (ParameterState(STEP, None, None), "lm_head.weight has no moments"),
        (ParameterState(STEP, ZEROS, None), "lm_head.weight has no moments"),
        (ParameterState(SGDStep(0.1, momentum=0.9, step=2), None, None), "lm_head.weight has no moments"),
        (ParameterState(STEP, damaged(float("nan")), ZEROS), "exp_avg of lm_head.weight: expected finite"),
        (ParameterState(STEP, ZEROS, damaged(float("inf"))), "exp_avg_sq of lm_head.weight: expected finite"),
        (ParameterState(STEP, damaged(-1.0), damaged(-1.0)), "exp_avg_sq of lm_head.weight: .* >= 0"),
        (ParameterState(STEP, ZEROS.to(torch.uint8), ZEROS), "exp_avg of lm_head.weight: .* torch.uint8"),
    ],
)  # fmt: skip
def test_validate_names_the_parameter(changed, message):
    model = tiny_llama()
    with pytest.raises(StateError, match=message) as error:
        AdamWState(make_state(model, **{"lm_head.weight": changed})).validate(model)
    one_line(error)


def test_validate_names_missing_and_extra_entries():
    model = tiny_llama()
    states = make_state(model)
    head = states.pop("lm_head.weight")
    with pytest.raises(StateError, match=r"missing for trainable lm_head.weight: "):
        AdamWState(states).validate(model)
    with pytest.raises(StateError, match=r"entries for value_head, not among the trainable"):
        AdamWState({**states, "lm_head.weight": head, "value_head": head}).validate(model)


def test_a_learning_rate_of_zero_everywhere_asks_for_lr():
    model = tiny_llama()
    optimizer = stepped_adamw(model)
    optimizer.param_groups[0]["lr"] = 0.0
    state = AdamWState.from_optimizer(model, optimizer)
    with pytest.raises(StateError) as error:
        state.validate(model)
    assert one_line(error) == ("the learning rate is 0 in every group (a schedule that has decayed to 0?): pass lr=")
    state.with_overrides(lr=1e-5).validate(model)


# with_overrides


def test_overrides_replace_only_what_is_given():
    model = tiny_llama()
    state = AdamWState(make_state(model))
    changed = state.with_overrides(lr=0.5, betas=(0.7, 0.8), eps=1e-4, weight_decay=0.3)
    assert changed["lm_head.weight"].step == AdamWStep(0.5, 0.7, 0.8, 1e-4, 0.3, step=3)
    assert changed["lm_head.weight"].exp_avg is state["lm_head.weight"].exp_avg
    assert state["lm_head.weight"].step == AdamWStep(1e-3, step=3)
    assert state.with_overrides(lr=0.5)["lm_head.weight"].step == AdamWStep(0.5, step=3)
    assert_same(state.with_overrides(), state)


def test_overrides_out_of_range_or_unknown_to_sgd_are_refused():
    model = tiny_llama()
    state = AdamWState(make_state(model))
    with pytest.raises(ArgumentError, match="lr=-1"):
        state.with_overrides(lr=-1.0)
    for betas in ((0.9,), 0.9):
        with pytest.raises(ArgumentError, match="expected two numbers"):
            state.with_overrides(betas=betas)
    for setting in ("lr", "eps", "weight_decay"):
        with pytest.raises(ArgumentError, match=f"{setting}='x': expected a number"):
            state.with_overrides(**{setting: "x"})
    for setting in ("lr", "beta1", "beta2", "eps", "weight_decay"):
        with pytest.raises(ArgumentError, match=f"{setting}=None: expected"):
            AdamWStep(**{"lr": 0.1, setting: None})
    for states in ([1], None):
        with pytest.raises(ArgumentError, match="states: expected a mapping from parameter name to state, got"):
            AdamWState(states)
    sgd = AdamWState.from_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sgd.with_overrides(lr=0.2, weight_decay=0.1)["lm_head.weight"].step == SGDStep(0.2, weight_decay=0.1)
    with pytest.raises(ArgumentError, match="beta1, beta2, eps: the state is of SGD"):
        sgd.with_overrides(betas=(0.9, 0.99), eps=1e-8)


# save, load, digest


@pytest.mark.parametrize("change", [{"format": "montessori adamw_state 99"}, {"parameters": {"lm_head.weight": -1}}])
def test_what_save_does_not_write_is_not_loaded(tmp_path, change):
    AdamWState(make_state(tiny_llama())).save(tmp_path)
    file = tmp_path / "adamw_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(StateError, match=r"adamw_state\.json: expected what save writes"):
        AdamWState.load(tmp_path)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "momentum"])
def test_save_and_load_keep_everything(tmp_path, kind):
    model = tiny_llama()
    parameters = list(model.parameters())
    groups = [{"params": parameters[2:], "lr": 0.1 / 3}, {"params": parameters[:2]}]
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
    else:
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9 if kind == "momentum" else 0.0)
    take_steps(model, optimizer)
    state = AdamWState.from_optimizer(model, optimizer)
    state.save(tmp_path / "new" / "state")
    loaded = AdamWState.load(tmp_path / "new" / "state")
    assert_same(state, loaded)
    assert loaded.digest() == state.digest()
    record = json.loads((tmp_path / "new" / "state" / "adamw_state.json").read_text())
    assert len(record["groups"]) == 2
    files = sorted(entry.name for entry in (tmp_path / "new" / "state").iterdir())
    assert files == ["adamw_state.json", "adamw_state.safetensors"]


def test_tensor_file_is_keyed_by_name_and_takes_views(tmp_path):
    storage = torch.arange(32.0)
    views = ParameterState(STEP, storage[:8].view(2, 4), storage[8:16].view(4, 2).T)
    states = {"a": views, "b": ParameterState(STEP, storage[16:24], storage[16:24])}
    AdamWState(states).save(tmp_path)
    AdamWState(states).save(tmp_path)
    tensors = load_file(tmp_path / "adamw_state.safetensors")
    assert sorted(tensors) == ["exp_avg.a", "exp_avg.b", "exp_avg_sq.a", "exp_avg_sq.b"]
    assert_same(AdamWState.load(tmp_path), AdamWState(states))


def test_an_interrupted_or_damaged_save_is_refused(tmp_path, monkeypatch):
    state = AdamWState(make_state(tiny_llama()))
    state.save(tmp_path)
    tensor_file, record_file = tmp_path / "adamw_state.safetensors", tmp_path / "adamw_state.json"
    record, tensors = record_file.read_text(), tensor_file.read_bytes()

    def full_disk(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(optim_state, "save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            state.save(tmp_path)
    assert not record_file.exists()
    with pytest.raises(StateError, match=r"adamw_state.json is missing"):
        AdamWState.load(tmp_path)
    for text in ("{", "[]", record.replace('"lr": 0.001', '"lr": -1'), record.replace("AdamW", "Lion")):
        record_file.write_text(text)
        with pytest.raises(StateError, match=r"adamw_state.json: expected what save writes"):
            AdamWState.load(tmp_path)
    record_file.write_text(record)
    tensor_file.write_bytes(tensors[:-100])
    with pytest.raises(StateError, match="expected a safetensors file"):
        AdamWState.load(tmp_path)
    save_file({"exp_avg.other": torch.zeros(2)}, tensor_file)
    with pytest.raises(StateError, match=r"has exp_avg.other, unknown to adamw_state.json"):
        AdamWState.load(tmp_path)


def test_digest_follows_content_only():
    state = AdamWState(make_state(tiny_llama()))
    digest = state.digest()
    assert len(digest) == 64
    assert int(digest, 16) >= 0
    assert AdamWState(dict(reversed(list(state.items())))).digest() == digest
    assert state.with_overrides(lr=2e-3).digest() != digest
    for label in ("exp_avg", "exp_avg_sq"):
        moments = {"exp_avg": ZEROS, "exp_avg_sq": ZEROS} | {label: damaged(1e-30)}
        changed = AdamWState({**state, "lm_head.weight": ParameterState(STEP, **moments)})
        assert changed.digest() != digest
    half = ParameterState(STEP, ZEROS.bfloat16(), ZEROS.bfloat16())
    assert AdamWState({**state, "lm_head.weight": half}).digest() != digest
