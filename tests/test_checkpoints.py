"""State read from checkpoint directories equals, by name and to the bit, the live optimizer's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from state_support import assert_reads_as_live, refusal, take_steps, tiny_llama, token_rows
from torch import nn
from transformers import Trainer, TrainingArguments

from montessori.checkpoints import read_state
from montessori.errors import StateError
from montessori.optim_state import AdamWState
from montessori.steps import SGDStep


def trainer_options(output_dir: Path, **changes) -> dict:
    options = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return options | changes


def trained(model: nn.Module, output_dir: Path, **changes) -> Trainer:
    arguments = TrainingArguments(**trainer_options(output_dir, **changes))
    trainer = Trainer(model=model, args=arguments, train_dataset=token_rows())
    trainer.train()
    return trainer


def save_torch(directory: Path, saved: object, name: str = "optimizer.pt") -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(saved, directory / name)
    return directory


# Trainer and TRL


def test_trainer_checkpoint(tmp_path):
    model = tiny_llama()
    trainer = trained(model, tmp_path)
    state = assert_reads_as_live(tmp_path / "checkpoint-2", model, trainer.optimizer)
    assert state["model.layers.0.mlp.up_proj.weight"].step.weight_decay == 0.1
    assert state["model.norm.weight"].step.weight_decay == 0.0
    assert {entry.step.step for entry in state.values()} == {3}
    assert {entry.step.decoupled for entry in state.values()} == {True}
    with pytest.raises(StateError, match="the learning rate is 0 in every group"):
        state.validate(model)
    state.with_overrides(lr=1e-3).validate(model)
    read_state(str(tmp_path / "checkpoint-1"), model).validate(model)


def test_trainer_checkpoint_with_biases_tied_and_frozen_parameters(tmp_path):
    model = tiny_llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    model.model.layers[0].requires_grad_(False)
    trainer = trained(model, tmp_path)
    state = assert_reads_as_live(tmp_path / "checkpoint-2", model, trainer.optimizer)
    assert state["model.layers.1.mlp.up_proj.bias"].step.weight_decay == 0.0
    assert not any(name.startswith("model.layers.0.") or name == "lm_head.weight" for name in state)


def test_trainer_checkpoint_of_a_lora_adapter_holds_the_adapter_only(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config)
    trainer = trained(model, tmp_path, label_names=["labels"])
    state = assert_reads_as_live(tmp_path / "checkpoint-2", model, trainer.optimizer)
    assert len(state) == 8
    assert all(".lora_" in name for name in state)


def test_trainer_checkpoint_of_sgd(tmp_path):
    model = tiny_llama()
    trainer = trained(model, tmp_path, optim="sgd", optim_args="momentum=0.9", lr_scheduler_type="constant")
    state = assert_reads_as_live(tmp_path / "checkpoint-2", model, trainer.optimizer)
    assert state["lm_head.weight"].step == SGDStep(1e-3, momentum=0.9, weight_decay=0.1, step=2)
    state.validate(model)


def test_trl_checkpoint(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rows = [{"prompt": "one two", "completion": " three four"}] * 8
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**trainer_options(tmp_path, bf16=False, gradient_checkpointing=False)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert_reads_as_live(tmp_path / "checkpoint-2", trainer.model, trainer.optimizer)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "four"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# accelerate


@pytest.mark.parametrize("order", ["parameters", "decay split", "named_parameters"])
def test_accelerate_save_state(tmp_path, order):
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    if order == "decay split":
        flat = [p for p in model.parameters() if p.dim() == 1]
        square = [p for p in model.parameters() if p.dim() == 2]
        groups: object = [{"params": square}, {"params": flat, "weight_decay": 0.0}]
    else:
        groups = getattr(model, order)()
    optimizer: object = torch.optim.AdamW(groups, lr=1e-3)  # type: ignore[arg-type]
    model, optimizer = accelerator.prepare(model, optimizer)
    take_steps(model, optimizer)
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "optimizer.bin").is_file()
    assert_reads_as_live(tmp_path, model, optimizer).validate(model)


def test_groups_of_unknown_order_ask_for_the_live_optimizer(tmp_path):
    model = tiny_llama()
    parameters = list(model.parameters())
    for groups in ([parameters[:5], parameters[5:]], [parameters[:5], parameters[5:9], parameters[9:]]):
        optimizer = torch.optim.AdamW([{"params": group} for group in groups])
        take_steps(model, optimizer, steps=1)
        message = refusal(save_torch(tmp_path, optimizer.state_dict(), "optimizer.bin"), model)
        assert "param groups of [21] parameters, or of [16, 5]" in message
        assert f"got {[len(group) for group in groups]}" in message
        assert "AdamWState.from_optimizer(model, optimizer)" in message


def test_several_optimizers_are_refused(tmp_path):
    model = tiny_llama()
    saved = torch.optim.AdamW(model.parameters()).state_dict()
    for name in ("optimizer.bin", "optimizer_1.bin"):
        save_torch(tmp_path, saved, name)
    assert "expected one optimizer, got optimizer.bin, optimizer_1.bin" in refusal(tmp_path, model)


# names in the file, and this package's own format


def test_state_keyed_by_parameter_names(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer)
    saved = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    saved["state"] = {names[key]: entry for key, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = names[::-1]
    assert_reads_as_live(save_torch(tmp_path, saved), model, optimizer)
    model.lm_head.weight.requires_grad_(False)
    assert "lm_head.weight" not in read_state(tmp_path, model)


def test_names_unknown_to_the_model_are_refused(tmp_path):
    model = tiny_llama()
    model.value_head = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.named_parameters())
    take_steps(model, optimizer)
    save_torch(tmp_path, optimizer.state_dict())
    assert "entries for value_head.weight, value_head.bias" in refusal(tmp_path, tiny_llama())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_a_wrapped_model_are_read_as_its_own(tmp_path, prefix):
    model = tiny_llama(tie_word_embeddings=True)
    optimizer = torch.optim.AdamW([(prefix + name, parameter) for name, parameter in model.named_parameters()])
    take_steps(model, optimizer)
    assert_reads_as_live(save_torch(tmp_path, optimizer.state_dict()), model, optimizer)


def test_a_shared_parameter_is_read_by_any_of_its_names_and_once(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    both = list(model.named_parameters(remove_duplicate=False))
    # The head's name alone, which is the second.
    optimizer = torch.optim.AdamW([(name, p) for name, p in both if name != "model.embed_tokens.weight"])
    take_steps(model, optimizer)
    assert_reads_as_live(save_torch(tmp_path, optimizer.state_dict()), model, optimizer)
    twice = torch.optim.AdamW(both)
    take_steps(model, twice)
    save_torch(tmp_path, twice.state_dict())
    assert "expected model.embed_tokens.weight once, got it 2 times" in refusal(tmp_path, model)
    with pytest.raises(
        StateError, match=r"optimizer: expected model\.embed_tokens\.weight once in its groups, got it 2"
    ):
        AdamWState.from_optimizer(model, twice)


def test_own_format(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer)
    AdamWState.from_optimizer(model, optimizer).save(tmp_path)
    assert_reads_as_live(tmp_path, model, optimizer)
    assert "exp_avg of model.embed_tokens.weight: expected shape [64, 24], got [64, 16]" in refusal(
        tmp_path, tiny_llama(hidden_size=24)
    )
    (tmp_path / "adamw_state.json").unlink()
    assert "adamw_state.json is missing" in refusal(tmp_path, model)


# Adam or AdamW


@pytest.mark.parametrize(("mark", "decoupled"), [("as saved", False), ("absent", True), (True, True), (False, False)])
def test_decoupled_weight_decay_of_the_file_tells_adam_from_adamw(tmp_path, mark, decoupled):
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters())
    take_steps(model, optimizer, steps=1)
    saved = optimizer.state_dict()
    if mark == "absent":
        del saved["param_groups"][0]["decoupled_weight_decay"]
    elif mark != "as saved":
        saved["param_groups"][0]["decoupled_weight_decay"] = mark
    state = read_state(save_torch(tmp_path, saved), model)
    assert {entry.step.decoupled for entry in state.values()} == {decoupled}


# refusals


def test_state_of_another_model_names_the_parameter_and_both_shapes(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer, steps=1)
    save_torch(tmp_path, optimizer.state_dict())
    message = refusal(tmp_path, tiny_llama(intermediate_size=48))
    assert message == (
        "exp_avg of model.layers.0.mlp.gate_proj.weight: expected shape [48, 16], got [32, 16]: "
        "optimizer state of another model"
    )
    assert "expected param groups of [30]" in refusal(tmp_path, tiny_llama(num_hidden_layers=3))


def test_a_first_moment_that_is_the_second_is_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer, steps=1)
    entry = optimizer.state[model.lm_head.weight]
    entry["exp_avg"] = entry["exp_avg_sq"].clone()
    assert "lm_head.weight has the values of its exp_avg_sq" in refusal(
        save_torch(tmp_path, optimizer.state_dict()), model
    )


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        ({"prev": torch.zeros(1), "max_step": 3}, "max_step, prev"),
        ({"exp_avg_sq_row": torch.zeros(1)}, "exp_avg_sq_row"),
    ],
)
def test_foreign_state_is_named(tmp_path, foreign, named):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer, steps=1)
    saved = optimizer.state_dict()
    saved["state"][0] |= foreign
    message = refusal(save_torch(tmp_path, saved), model)
    assert message.startswith(f"optimizer state of model.embed_tokens.weight: keys {named} are of another")


def test_an_optimizer_with_the_same_tensors_but_other_options_is_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.RAdam(model.parameters())
    take_steps(model, optimizer, steps=1)
    message = refusal(save_torch(tmp_path, optimizer.state_dict()), model)
    assert "has options betas, capturable, decoupled_weight_decay" in message
    lion = {"betas": (0.9, 0.99), "lr": 1e-4, "weight_decay": 0.0, "params": list(range(21))}
    message = refusal(save_torch(tmp_path, {"state": {}, "param_groups": [lion]}), model)
    assert "has options betas, lr, weight_decay: expected those of torch.optim.AdamW" in message


def test_incomplete_state_is_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer, steps=1)
    saved = optimizer.state_dict()
    del saved["state"][0]["exp_avg"]
    assert "expected step, exp_avg and exp_avg_sq, got exp_avg_sq, step" in refusal(save_torch(tmp_path, saved), model)
    saved["state"][0] = {"step": torch.tensor(1.5), "exp_avg": torch.zeros(64, 16), "exp_avg_sq": 3}
    assert "expected step to be a whole number >= 0, got 1.5" in refusal(save_torch(tmp_path, saved), model)
    saved["state"][0]["step"] = 1
    assert "expected exp_avg_sq to be a tensor, got int" in refusal(save_torch(tmp_path, saved), model)


def test_a_run_directory_lists_its_checkpoints(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best"):
        save_torch(tmp_path / name, {})
    assert refusal(tmp_path, tiny_llama()) == (
        f"{tmp_path}: expected one checkpoint, got a run: name one of checkpoint-9, checkpoint-10"
    )


def test_a_directory_that_is_absent_or_empty_names_what_is_looked_for(tmp_path):
    model = tiny_llama()
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", model)
    message = refusal(tmp_path, model)
    for part in (str(tmp_path), "optimizer.pt", "optimizer.bin", "adamw_state.json"):
        assert part in message


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, file = tiny_llama(), tmp_path / "optimizer.pt"
    save_torch(tmp_path, torch.optim.AdamW(model.parameters()).state_dict())
    whole = file.read_bytes()
    for content in (whole[:-40], whole[:100], b"", b"\x80\x04 not a pickle"):
        file.write_bytes(content)
        assert f"{file}: cannot be read as plain tensors" in refusal(tmp_path, model)
    save_torch(tmp_path, {"state": {0: Payload()}, "param_groups": []})
    refused = refusal(tmp_path, model)
    assert f"{file}: expected tensors and plain values, got objects" in refused and "weights_only" not in refused
    assert not Path("unpickled").exists()
    groups = [{"params": 5}]
    for content in ({"model": 1}, [1], {"state": {0: 1}, "param_groups": []}, {"state": {}, "param_groups": groups}):
        save_torch(tmp_path, content)
        assert "expected a torch optimizer's state and param_groups, got" in refusal(tmp_path, model)
    file.unlink()
    (tmp_path / "adamw_state.json").write_text(json.dumps({"format": "other"}))
    assert "adamw_state.safetensors is missing" in refusal(tmp_path, model)
