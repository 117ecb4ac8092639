"""Every model of the installed transformers that takes images or sound beside text, small and trained on text alone.

    python -m benchmarks.multimodal

The whole model is trained, towers included, which text does not reach. Truth as in `benchmarks.architectures`.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from benchmarks.architectures import VOCABULARY, UnbuiltError, as_small, check, moved, run, unbuilt

WIDTH = 32
MOST_PARAMETERS = 12_000_000
# What a config, and those inside it, are given of these, under whatever names they have for them. Ids that stand for
# images lie behind those of the text.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 2 * VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embed_dim", "width", "out_hidden_size", "text_hidden_size"), WIDTH
    ),
    **dict.fromkeys(
        ("text_hidden_size", "proj_dim", "projection_dim", "mm_embed_dim", "output_dim", "mm_hidden_size"), WIDTH
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_global_layers", "num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 48
    ),
    **dict.fromkeys(("projector_hidden_size",), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "q_lora_rank", "kv_lora_rank", "patch_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "bos_token_id"), 1),
    "sliding_window": 64,
    "image_size": 32,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Lists by layer, which follow the number of layers.
BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")
KEPT_APART = ("transformers_version", "architectures", "dtype", "_name_or_path", "id2label", "label2id", "model_type")


def rotary(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


QWEN3_5 = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "head_dim": 16,
    "rope_parameters": rotary(2, 1, 1, partial_rotary_factor=0.5, mrope_interleaved=True),
}
GEMMA4 = {"per_layer_config": None, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
QWEN3_VL = {
    "text_config": {"rope_parameters": rotary(2, 1, 1, mrope_interleaved=True)},
    "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
QWEN2_VL = {"text_config": {"rope_parameters": rotary(2, 1, 1)}, "vision_config": {"fullatt_block_indexes": [1]}}
GLM4V = {"text_config": {"rope_parameters": rotary(1, 2, 1)}}
# What single ones need besides; None leaves a setting out.
OWN: dict[str, dict[str, Any]] = {
    "qwen3_5": {"text_config": QWEN3_5},
    "qwen3_5_moe": {"text_config": QWEN3_5},
    "minicpmv4_6": {"text_config": QWEN3_5},
    "minicpmv4_7": {"text_config": QWEN3_5},
    "minicpm_ocr": {"text_config": QWEN3_5},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), QWEN2_VL),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), QWEN3_VL),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr"), GLM4V),
    "glm4v_moe": {"text_config": {"rope_parameters": rotary(1, 1, 0)}},
    "paddleocr_vl": {"text_config": {"rope_parameters": rotary(2, 1, 1)}},
    "gemma4": {
        "text_config": {**GEMMA4, "hidden_size_per_layer_input": 8},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8, "patch_size": 8,
            "position_embedding_size": 64, "pooling_kernel_size": 2,
        },
    },
    "gemma4_unified": {"text_config": {**GEMMA4, "hidden_size_per_layer_input": 8}},
    "kimi_k25": {"text_config": {"num_key_value_heads": 4}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "chameleon": {
        "vocabulary_map": {"<image>": 8, "IMGIMGA": 9},
        "vq_config": {
            "embed_dim": 32, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1],
            "latent_channels": 32,
        },
    },
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A narrow model, all its vectors away from their initial values."""
    kind = CONFIG_MAPPING[name]
    torch.manual_seed(0)
    # Whatever a family raises at sizes that it was not made for.
    try:
        ids = itertools.cycle(range(VOCABULARY, 2 * VOCABULARY))
        values = _merged(_narrow(kind().to_dict(), ids), OWN.get(name, {}))
        config = kind(**values)
        model = as_small(partial(transformers.AutoModelForMultimodalLM.from_config, config), MOST_PARAMETERS)
    except UnbuiltError:
        raise
    except Exception as error:
        raise unbuilt(error) from error
    return moved(model)


def _narrow(values: dict[str, Any], ids: Any) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in KEPT_APART or (key in BY_LAYER and isinstance(value, list)):
            continue
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            small[key] = _narrow(value, ids) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif key in SMALL and number:
            small[key] = SMALL[key]
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            small[key] = next(ids)
        elif key == "use_cache":
            small[key] = False
        else:
            small[key] = value
    return small


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in values.items() if changes.get(key, value) is not None or key not in changes}
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict) and not key.startswith("rope"):
            merged[key] = _merged(values[key], value)
        elif value is not None:
            merged[key] = value
    return merged


if __name__ == "__main__":
    run(__doc__, "multimodal", sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES), partial(check, build=build))
