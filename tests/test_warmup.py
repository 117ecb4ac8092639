"""The warm-up run: an ordinary Trainer checkpoint, resumed after any cut, with the promised state."""

from __future__ import annotations

import copy
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from montessori.batching import Example
from montessori.checkpoints import read_state
from montessori.errors import ArgumentError, DataError, ModelError, ResourceError
from montessori.warmup import warmup


@pytest.fixture(autouse=True, scope="module")
def save_after_every_step():
    """Runs of a few steps leave a checkpoint after each, as long runs do after each part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("montessori.training._SAVES_PER_RUN", 10)
        yield


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(pad_token: str | None = "<pad>"):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="<eos>", unk_token="<unk>"
    )


def make_examples(count: int = 10) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        input_ids = torch.randint(3, 64, (4 + index % 5,), generator=generator)
        labels = input_ids.clone()
        labels[:2] = -100
        examples.append(Example(input_ids, labels, index))
    return examples


OPTIONS = {"learning_rate": 1e-3, "batch_size": 4, "per_device_train_batch_size": 2, "progress": False}


def run(output_dir: Path, model: nn.Module | None = None, **changes) -> tuple[nn.Module, Path]:
    model = tiny_llama() if model is None else model
    options = OPTIONS | {"num_train_epochs": 2} | changes
    examples = options.pop("examples", make_examples())
    return model, warmup(model, options.pop("tokenizer", tiny_tokenizer()), examples, output_dir, **options)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    weights = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def checkpoint_names(output_dir: Path) -> list[str]:
    return sorted(entry.name for entry in output_dir.glob("checkpoint-*"))


def test_final_checkpoint_is_ordinary_and_holds_the_learning_rate(tmp_path):
    # 10 examples in batches of 4 are 3 steps an epoch, the last of them partial.
    model, checkpoint = run(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-6"
    assert checkpoint_names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(checkpoint))
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 3
    state = read_state(checkpoint, model)
    state.validate(model)
    assert {entry.step.step for entry in state.values()} == {7}
    assert {entry.step.lr for entry in state.values()} == {1e-3}
    assert {entry.step.weight_decay for entry in state.values()} == {0.0}
    before = read_state(tmp_path / "checkpoint-5", model)
    assert all(entry.step.lr == pytest.approx(1e-3 * 5 / 6) for entry in before.values())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_is_full_is_an_error_of_one_line_and_the_run_goes_on(file, tmp_path):
    whole, checkpoint = run(tmp_path / "whole")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The optimizer's two moments take twice the room of the weights, which come first.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((checkpoint / file).stat().st_size * 3 // 4, unlimited[1]))
    try:
        with pytest.raises(ResourceError, match=r"cut: cannot be written \(.*\): is the disk full\?") as caught:
            run(tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(caught.value)
    model, _ = run(tmp_path / "cut")
    assert_same_weights(model, whole)


def test_model_is_trained_and_usable_on_exit(tmp_path):
    start = tiny_llama()
    model, _ = run(tmp_path, copy.deepcopy(start))
    assert not model.training
    assert model.config.use_cache == start.config.use_cache
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert model(input_ids=torch.arange(3, 8)[None]).logits.isfinite().all()
    assert model.train().training


def test_batches_are_padded_masked_and_accumulated(tmp_path, monkeypatch):
    seen = []
    step = Trainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        seen.append({key: value.clone() for key, value in inputs.items()})
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    run(tmp_path, num_train_epochs=1)
    assert [len(inputs["input_ids"]) for inputs in seen] == [2] * 5
    rows = []
    for inputs in seen:
        assert (inputs["labels"][inputs["attention_mask"] == 0] == -100).all()
        for ids, labels, mask in zip(*(inputs[key] for key in ("input_ids", "labels", "attention_mask")), strict=True):
            rows.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))
    expected = [(example.input_ids.tolist(), example.labels.tolist()) for example in make_examples()]
    assert sorted(rows) == sorted(expected)


def test_max_steps_and_weight_decay_reach_the_optimizer(tmp_path):
    model, checkpoint = run(tmp_path, max_steps=2, weight_decay=0.1)
    assert checkpoint == tmp_path / "checkpoint-2"
    state = read_state(checkpoint, model)
    assert state["lm_head.weight"].step.weight_decay == 0.1
    assert state["model.norm.weight"].step.weight_decay == 0.0
    assert state["lm_head.weight"].step.lr == 1e-3


def test_options_reach_the_trainer(tmp_path, monkeypatch):
    given = []

    def train(self, resume_from_checkpoint):
        given.append(self.args)
        raise KilledError

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(KilledError):
        run(tmp_path, batch_size=6, seed=7, max_grad_norm=0.5)
    (arguments,) = given
    assert arguments.gradient_accumulation_steps == 3
    assert arguments.seed == 7
    assert arguments.max_grad_norm == 0.5
    assert arguments.optim == "adamw_torch"
    assert arguments.report_to == []
    assert arguments.save_total_limit == 2


class KilledError(Exception):
    pass


def kill_after(monkeypatch, steps: int) -> None:
    save = Trainer._save_checkpoint

    def save_and_die(self, *arguments):
        save(self, *arguments)
        if self.state.global_step == steps:
            raise KilledError

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_die)


def count_steps(monkeypatch) -> list[int]:
    steps: list[int] = []
    save = Trainer._save_checkpoint

    def counted(self, *arguments):
        steps.append(self.state.global_step)
        save(self, *arguments)

    monkeypatch.setattr(Trainer, "_save_checkpoint", counted)
    return steps


def test_a_killed_run_goes_on_and_ends_as_if_never_cut(tmp_path, monkeypatch):
    whole, checkpoint = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, steps=4)
        with pytest.raises(KilledError):
            run(tmp_path / "cut")
    with monkeypatch.context() as patch:
        steps = count_steps(patch)
        resumed, again = run(tmp_path / "cut")
    assert steps == [5, 6]
    assert again == tmp_path / "cut" / "checkpoint-6"
    assert_same_weights(whole, resumed)
    assert read_state(again, resumed).digest() == read_state(checkpoint, whole).digest()
    assert checkpoint_names(tmp_path / "cut") == ["checkpoint-5", "checkpoint-6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[nn.Module, Path]:
    return run(tmp_path_factory.mktemp("finished"))


def cut_file(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) * 2 // 3])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_cut_while_writing_is_not_taken(tmp_path, monkeypatch, finished, name, absent):
    model, checkpoint = finished
    shutil.copytree(checkpoint.parent, tmp_path, dirs_exist_ok=True)
    if absent:
        (tmp_path / "checkpoint-6" / name).unlink()
    else:
        cut_file(tmp_path / "checkpoint-6", name)
    (tmp_path / "checkpoint-6" / "left over").touch()
    steps = count_steps(monkeypatch)
    resumed, again = run(tmp_path)
    assert steps == [6]
    assert not (again / "left over").exists()
    assert again == tmp_path / "checkpoint-6"
    assert_same_weights(model, resumed)


def test_a_run_cut_before_its_first_whole_checkpoint_starts_again(tmp_path, monkeypatch, finished):
    model, checkpoint = finished
    shutil.copytree(checkpoint.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    cut_file(tmp_path / "checkpoint-5", "optimizer.pt")
    steps = count_steps(monkeypatch)
    resumed, _ = run(tmp_path)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_weights(model, resumed)


def test_a_finished_run_returns_its_weights_without_training(finished, monkeypatch):
    model, checkpoint = finished
    monkeypatch.setattr(Trainer, "train", None)
    files = {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")}
    for start in (tiny_llama(), copy.deepcopy(model)):
        trained, again = run(checkpoint.parent, start)
        assert again == checkpoint
        assert_same_weights(model, trained)
        assert not trained.training
    assert files == {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"seed": 1, "weight_decay": 0.1}, "weight_decay, seed"),
        ({"examples": make_examples(9)}, "examples"),
        ({"model": tiny_llama(seed=1)}, "the weights of model"),
    ],
)
def test_a_directory_of_another_run_is_refused(finished, changes, named):
    _, checkpoint = finished
    with pytest.raises(ArgumentError, match=f"holds a run with other {named}: "):
        run(checkpoint.parent, **changes)


def test_a_directory_in_use_is_refused_without_resume(tmp_path, finished):
    _, checkpoint = finished
    with pytest.raises(ArgumentError, match="expected none with resume=False"):
        run(checkpoint.parent, resume=False)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ArgumentError, match="holds checkpoints of another run"):
        run(tmp_path)
    _, checkpoint = run(tmp_path / "new", max_steps=1, resume=False)
    assert checkpoint.is_dir()


def test_settings_of_the_run_are_kept(finished):
    _, checkpoint = finished
    record = json.loads((checkpoint.parent / "warmup.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3
    assert record["settings"]["batch_size"] == 4
    assert len(record["weights"]) == 2


def test_a_lora_adapter_is_warmed_up_and_restored(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def adapted() -> nn.Module:
        base = tiny_llama()
        torch.manual_seed(1)
        return peft.get_peft_model(base, config)

    model, checkpoint = run(tmp_path, adapted())
    state = read_state(checkpoint, model)
    state.validate(model)
    assert len(state) == 4
    monkeypatch.setattr(Trainer, "train", None)
    restored, _ = run(tmp_path, adapted())
    assert_same_weights(model, restored)
    assert all(".lora_" in name for name, p in restored.named_parameters() if p.requires_grad)
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), checkpoint / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"the adapter lacks .*lora_A"):
        run(tmp_path, adapted())


def test_a_mixture_of_experts_goes_on_from_its_own_weights(tmp_path):
    # Its checkpoint names the experts one by one, which Trainer alone would leave unread.
    def mixture() -> nn.Module:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
        return MixtralForCausalLM(config).eval()

    whole, checkpoint = run(tmp_path, mixture())
    shutil.rmtree(checkpoint)
    resumed, _ = run(tmp_path, mixture())
    assert_same_weights(whole, resumed)


def test_a_tokenizer_without_pad_token_is_saved_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer(pad_token=None)
    _, checkpoint = run(tmp_path, tokenizer=tokenizer, max_steps=1)
    assert tokenizer.pad_token is None
    assert AutoTokenizer.from_pretrained(checkpoint).pad_token is None
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="expected a pad_token or an eos_token"):
        run(tmp_path / "other", tokenizer=tokenizer, max_steps=1)


def test_progress_is_printed_only_when_asked_for(tmp_path, capfd):
    run(tmp_path / "quiet", max_steps=2)
    quiet = capfd.readouterr()
    assert "train_runtime" not in quiet.out
    assert "loss" not in quiet.out + quiet.err
    run(tmp_path / "loud", max_steps=2, progress=True)
    loud = capfd.readouterr()
    assert "loss" in loud.out + loud.err


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"examples": []}, DataError, "expected at least one example"),
        ({"batch_size": 5}, ArgumentError, "batch_size=5: expected a multiple of per_device_"),
        ({"batch_size": 0}, ArgumentError, "batch_size=0: expected a positive number"),
        ({"per_device_train_batch_size": 0}, ArgumentError, "per_device_train_batch_size=0: expected"),
        ({"max_steps": 0}, ArgumentError, "max_steps=0: expected at least 1, or -1"),
        ({"max_steps": 1.5}, ArgumentError, "max_steps=1.5: expected at least 1, or -1"),
        ({"weight_decay": -1}, ArgumentError, "weight_decay=-1: expected 0 or a positive number"),
        ({"seed": -1}, ArgumentError, "seed=-1: expected a number from 0"),
        ({"model": tiny_llama().bfloat16()}, ModelError, "model.embed_tokens.weight: expected .* float32"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message) as error:
        run(tmp_path / "new", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_an_output_directory_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/warm")):
        with pytest.raises(ResourceError, match=f"{path}.*: cannot be written"):
            run(path)


def test_a_damaged_record_of_a_run_is_named(tmp_path):
    for content in ("{", "[]", '{"settings": {}}'):
        (tmp_path / "warmup.json").write_text(content)
        with pytest.raises(ArgumentError, match=r"warmup\.json: expected the record of a warm-up"):
            run(tmp_path)


def test_a_final_checkpoint_that_did_not_reach_the_disk_is_an_error(tmp_path, monkeypatch):
    save = Trainer._save_checkpoint

    def save_partly(self, *arguments):
        save(self, *arguments)
        cut_file(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", "optimizer.pt")

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_partly)
    with pytest.raises(ResourceError, match="expected a complete checkpoint after 2 steps"):
        run(tmp_path, max_steps=2)
