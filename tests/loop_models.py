"""A teacher that needs no training: random weights over few words, one of which is the closing mark."""

from __future__ import annotations

import torch
import transformers
from support import CHATML, WORDS

from montessori.loop.prompts import CLOSE, OPEN

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
