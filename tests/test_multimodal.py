"""Checkpoints of models that also take images: what is loaded, and what stays beside them."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_models import assert_same_weights, saved_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from montessori.models import copy_processor, load_model

QWEN2_VL_POSITIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def multimodal(kind: str, **config):
    """A narrow model of a family of which transformers has a text model and a whole one."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, **heads, **config}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "depth": 1, "out_hidden_size": 16}
    whole = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    return transformers.AutoModelForMultimodalLM.from_config(whole).eval()


@pytest.mark.parametrize(("kind", "config"), [
    ("qwen3_5", {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                 "linear_value_head_dim": 8}),
    ("qwen2_5_vl", {"rope_parameters": QWEN2_VL_POSITIONS}),
])  # fmt: skip
def test_a_model_that_also_takes_images_is_loaded_as_it_was_saved(tmp_path, kind, config):
    saved = multimodal(kind, **config)
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert type(model) is type(saved)
    assert_same_weights(saved, model)


def test_what_prepares_images_is_kept_beside_such_a_model(tmp_path):
    (source := tmp_path / "source").mkdir()
    (target := tmp_path / "target").mkdir()
    multimodal("qwen2_5_vl", rope_parameters=QWEN2_VL_POSITIONS).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    copy_processor(load_model(source)[0], target)
    assert [file.name for file in target.iterdir()] == ["preprocessor_config.json"]
    copy_processor(saved_llama(source), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_processor_that_cannot_be_fetched_is_told_of(tmp_path, monkeypatch):
    model = multimodal("qwen2_5_vl", rope_parameters=QWEN2_VL_POSITIONS)
    model.name_or_path = "someone/some-model"

    def fails(name, **options):
        raise OSError(f"{name} is out of reach\nsecond line")

    monkeypatch.setattr("montessori.models.snapshot_download", fails)
    with pytest.warns(UserWarning, match=r"cannot be copied \(someone/some-model is out of reach\); some engines"):
        copy_processor(model, tmp_path)


def test_the_text_model_of_such_a_family_stays_one(tmp_path):
    config = transformers.AutoConfig.for_model("qwen3_5").text_config
    for name, value in {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}.items():
        setattr(config, name, value)
    config.layer_types = config.layer_types[:1]
    saved = AutoModelForCausalLM.from_config(config)
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert_same_weights(saved, load_model(tmp_path)[0])
