"""Batches of sequences in models of every kind of cache: the logits of each are those of the model on it alone."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from support import CONFIGS, RECURRENT, VOCABULARY, make_model

from montessori.errors import FallbackWarning, ModelError
from montessori.loop.sequences import Cached, Reread, proved_sequences

_NARROW = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2}  # fmt: skip
HYBRIDS = {
    "lfm2": lambda: transformers.Lfm2Config(**_NARROW, layer_types=["conv", "full_attention"]),
    # Attention and a state in one layer.
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_NARROW, head_dim=4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4
    ),
}
# Mamba reads padding into its state; positions of RoBERTa are counted from padding.
WITHOUT = {
    "mamba": RECURRENT["mamba"],
    "roberta": lambda: transformers.RobertaConfig(
        **{**_NARROW, "pad_token_id": 1}, is_decoder=True, max_position_embeddings=64
    ),
}


def build(config: transformers.PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def assert_logits_are_the_models(kind: type[Cached] | type[Reread], model: torch.nn.Module) -> None:
    drawn = torch.Generator().manual_seed(3)
    texts = [torch.randint(2, VOCABULARY, (length,), generator=drawn).tolist() for length in (2, 9, 5, 8)]
    texts.append(list(texts[1]))
    sequences = kind(model, texts)
    for rows in ([0, 1, 2, 3, 4], [4, 0, 2], [2, 2, 1, 0]):
        for text, logits in zip(texts, sequences.logits, strict=True):
            alone = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].float()
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
        tokens = torch.randint(2, VOCABULARY, (len(rows),), generator=drawn)
        sequences.keep(torch.tensor(rows))
        sequences.step(tokens)
        texts = [[*texts[row], int(token)] for row, token in zip(rows, tokens, strict=True)]


@pytest.mark.parametrize("name", [*CONFIGS, "qwen3_5"])
def test_models_with_keys_windows_and_states_go_with_their_cache(name):
    model = make_model(name, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        kind = proved_sequences(model)
    assert kind is Cached
    assert_logits_are_the_models(kind, model)


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_follow_their_rows(name):
    model = build(HYBRIDS[name]())
    assert proved_sequences(model) is Cached
    assert_logits_are_the_models(Cached, model)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_cache_that_padding_spoils_is_left_alone(name):
    model = build(WITHOUT[name]())
    with pytest.warns(FallbackWarning, match="batches cannot use its cache .* every token reads the whole text again"):
        kind = proved_sequences(model)
    assert kind is Reread
    assert_logits_are_the_models(kind, model)


def test_what_a_cache_fails_with_is_told(monkeypatch):
    model = make_model("llama_tied", torch.float32)

    def fails(*_: object) -> None:
        raise AttributeError("no such layer\nof a cache")

    monkeypatch.setattr("montessori.loop.sequences.select_rows", fails)
    with pytest.warns(FallbackWarning, match=r"cannot use its cache \(no such layer\); every token"):
        assert proved_sequences(model) is Reread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_narrow_weights_is_no_reason(dtype):
    assert proved_sequences(make_model("llama_tied", dtype)) is Cached


@pytest.mark.parametrize("name", ["llama_lora", "qwen3_5"])
def test_an_adapter_has_the_cache_of_its_base(name):
    model = make_model(name, torch.float32)
    if name != "llama_lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert proved_sequences(model.eval()) is Cached
    assert_logits_are_the_models(Cached, model)


def test_logits_that_are_not_finite_are_an_error():
    model = make_model("llama_tied", torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="expected finite logits, got NaN or Inf in float32"):
        proved_sequences(model)


def test_the_rounding_of_many_layers_is_no_reason():
    config = transformers.GraniteMoeHybridConfig(
        **{**_NARROW, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 40}, num_local_experts=8,
        layer_types=[*["mamba"] * 9, "attention"] * 4, num_experts_per_tok=2, shared_intermediate_size=64,
        mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8, mamba_n_groups=1,
    )  # fmt: skip
    assert proved_sequences(build(config).bfloat16()) is Cached
