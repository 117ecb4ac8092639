"""A teacher that needs no training: random weights over few words, one of which is the closing mark."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from support import CHATML, WORDS, make_text_rows

from montessori.loop.config import Config
from montessori.loop.prompts import CLOSE, OPEN
from montessori.writing import write_jsonl

ALPHABET = [f"{first}{second}" for first in "bdfgklmnprst" for second in "aeiou"]


def make_word_tokenizer():
    """Words of two letters and of WORDS; the marks are words. Every id has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", CLOSE, OPEN, *WORDS, *ALPHABET]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_teacher(path, seed: int = 1):
    """Save a tiny llama in which nearly any word follows any other; returns `path`."""
    tokenizer = make_word_tokenizer()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=1,
        initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_settings(path: Path) -> dict:
    """Plain settings of a run of seconds, with the models and rows that they name below `path`."""
    seeds = [{"instruction": f"Seed task {word} about {word}ing {word}s"} for word in "abcdefgh"]
    write_jsonl(path / "seeds.jsonl", seeds)
    write_jsonl(path / "reference.jsonl", make_text_rows(9, seed=3))
    sampling = {"presence_penalty": 0.0, "top_p": 1.0, "max_new_tokens": 60}
    training = {"learning_rate": 1e-3, "batch_size": 4, "per_device_train_batch_size": 2}
    return {
        "seed": 1,
        "teacher": str(make_teacher(path / "teacher", seed=1)),
        "student": str(make_teacher(path / "student", seed=2)),
        "data": {
            "seeds": str(path / "seeds.jsonl"),
            "reference": str(path / "reference.jsonl"),
            "reference_rows": 5,
        },
        "engine": {"batch_size": 8, "device": "cpu"},
        "generate": {
            "style": "completion",
            "seed_examples": 2,
            "own_examples": 1,
            "prompts_per_wave": 3,
            "sampling": sampling,
        },
        "responses": {"sampling": {**sampling, "max_new_tokens": 12}},
        "split": {"warmup": 8, "probe": 16, "final": 8},
        "warmup": training,
        "score": {"device": "cpu"},
        "pairs": {"rule": "difference", "per_prompt": 2},
        "tune": {**training, "batch_size": 2},
        "train": training,
        "evaluate": {"sample": 2, "resamples": 100},
    }


def make_config(settings: dict, **changes) -> Config:
    return Config.read({**settings, **changes}, "test")
