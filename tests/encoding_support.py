"""Tokenizers, conversations and what a test reads off an encoded row."""

import itertools

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from montessori.encoding import encode_rows
from montessori.errors import DataError
from montessori.templates import BUILT_IN_TEMPLATES

CHATML = BUILT_IN_TEMPLATES["chatml"]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
BOS = "{{ bos_token }}"
# Ends with something else when another message follows, and not with a special token.
OPEN_ENDED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + ('END' if loop.last else ' / ') }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)
# Leaves the thoughts out, and lets the model begin with some.
THOUGHTLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
THOUGHTFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think></think>' if m.role == 'assistant' and loop.last }}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["What is two and two? It is four.", "And three? Six of course.", "user\n\n\nassistant"] * 4
ROW = {"instruction": "What is two and two?", "response": "It is four."}
TEXT = f"<|im_start|>user\n{ROW['instruction']}<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
USER = {"role": "user", "content": ROW["instruction"]}
ASSISTANT = {"role": "assistant", "content": ROW["response"]}
TURNS = [USER, ASSISTANT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Six."}]
THOUGHTS = [
    message if message["role"] == "user" else {**message, "content": f"<think>Hm.</think>{message['content']}"}
    for message in TURNS
]


def wrapped(inner, template, **special):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(*added, template=CHATML, **special):
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens(list(added or ("<|im_start|>", "<|im_end|>")))
    return wrapped(inner, template, **special)


def sentence_piece(scheme, template):
    """Like those of Llama 2: spaces are "▁", and a text begins with one unless `scheme` is "never"."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    return wrapped(inner, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encode(rows, tokenizer, max_length=4096, **options):
    return encode_rows(rows, tokenizer, max_length=max_length, **options)


def one(row, tokenizer, **options):
    (example,) = encode([row], tokenizer, **options).examples
    return example


def fault(rows, tokenizer, error=DataError, **options):
    """The message of the error, checked to be one line."""
    with pytest.raises(error) as caught:
        encode(rows, tokenizer, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def runs(example, tokenizer):
    """Texts of the unbroken runs of labels, after a check that labels are the tokens themselves."""
    labelled = example.labels != -100
    assert torch.equal(example.labels[labelled], example.input_ids[labelled])
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    groups = itertools.groupby(example.labels.tolist(), lambda label: label != -100)
    return [tokenizer.decode(list(group)) for is_label, group in groups if is_label]


def text(example, tokenizer):
    return tokenizer.decode(example.input_ids)
