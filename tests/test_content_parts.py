"""Templates of models for images and text, which loop over the parts of a content and write no text that is none."""

import pytest
from encoding_support import ASSISTANT, CHATML, ROW, TURNS, USER, byte_level, encode, fault, one, runs, text

from montessori.data import Rows
from montessori.loop.prompts import ask, converse, instruction_text
from montessori.templates import Template

# As SmolVLM and Idefics have it.
LOOPING = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# As LLaVA has it.
SELECTING = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
UNMARKED = SELECTING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen-VL and Gemma 3 have it.
TAKING_BOTH = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST_PART = CHATML.replace("['content']", "['content'][0]['text']")
SYSTEM = {"role": "system", "content": "Be brief."}


def in_parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def check(example, tokenizer, template, messages):
    """The ids are those that transformers gives the messages."""
    ids = tokenizer.apply_chat_template(messages, chat_template=template)["input_ids"]
    assert example.input_ids.tolist() == ids


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"messages": TURNS[:2]},
        {"messages": in_parts(TURNS[:2])},
        {"messages": [*in_parts([USER]), ASSISTANT]},
        {"prompt": [USER], "completion": in_parts([ASSISTANT])},
    ],
)
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (LOOPING, " It is four.<|im_end|>"),
        (SELECTING, " It is four. "),
        (UNMARKED, " It is four. "),
        (FIRST_PART, "It is four.<|im_end|>"),
    ],
)
def test_every_row_is_written_in_parts_where_the_template_needs_them(tokenizer, template, answer, row):
    example = one(row, tokenizer, chat_template=template)
    check(example, tokenizer, template, in_parts(TURNS[:2]))
    assert runs(example, tokenizer) == [answer]


@pytest.mark.parametrize(
    "messages", [TURNS, [SYSTEM, *TURNS], [*TURNS, USER], [{**SYSTEM, "role": "developer"}, *TURNS]]
)
def test_every_turn_is_labelled(tokenizer, messages):
    for rows in (messages, in_parts(messages)):
        for template, answers in (
            (LOOPING, [" It is four.<|im_end|>", " Six.<|im_end|>"]),
            (UNMARKED, [" It is four. ", " Six. "]),
        ):
            example = one({"messages": rows}, tokenizer, chat_template=template)
            check(example, tokenizer, template, in_parts(messages))
            assert runs(example, tokenizer) == answers
        marked = one({"messages": rows}, tokenizer, chat_template=SELECTING)
        expected = tokenizer.apply_chat_template(
            in_parts(messages), chat_template=SELECTING, return_assistant_tokens_mask=True, return_dict=True
        )
        assert marked.input_ids.tolist() == expected["input_ids"]
        assert (marked.labels != -100).long().tolist() == expected["assistant_masks"]


@pytest.mark.parametrize(("template", "answer"), [(LOOPING, " Six.<|im_end|>"), (SELECTING, " Six. ")])
def test_answers_in_a_prompt_are_not_labelled(tokenizer, template, answer):
    example = one({"prompt": TURNS[:3], "completion": in_parts(TURNS[3:])}, tokenizer, chat_template=template)
    check(example, tokenizer, template, in_parts(TURNS))
    assert runs(example, tokenizer) == [answer]


def test_several_parts_of_a_content_stay_apart(tokenizer):
    said = [{"type": "text", "text": part} for part in ("It is", "four.\n", " ")]
    messages = [*in_parts([USER]), {"role": "assistant", "content": said}]
    for template in (LOOPING, SELECTING, UNMARKED):
        check(one({"messages": messages}, tokenizer, chat_template=template), tokenizer, template, messages)


def test_turns_that_are_rewritten_later_are_found_in_the_whole(tokenizer):
    template = LOOPING.replace("{% for line", "{{ '<think></think>' if loop.last }}{% for line")
    first = {"role": "assistant", "content": [{"type": "text", "text": part} for part in ("It is", " four.", "\n")]}
    messages = [*in_parts(TURNS[:1]), first, *in_parts(TURNS[2:])]
    example = one({"messages": messages}, tokenizer, chat_template=template)
    check(example, tokenizer, template, messages)
    assert runs(example, tokenizer) == [" It is four.\n<|im_end|>", " <think></think>Six.<|im_end|>"]


def test_a_template_that_writes_texts_is_given_texts(tokenizer):
    messages = [USER, {"role": "assistant", "content": "It is four. Or five."}]
    parts = [{"type": "text", "text": part} for part in ("It is four. ", "Or five.")]
    for template in (CHATML, TAKING_BOTH):
        for content in (messages[1]["content"], parts):
            example = one({"messages": [USER, {**ASSISTANT, "content": content}]}, tokenizer, chat_template=template)
            check(example, tokenizer, template, messages)


@pytest.mark.parametrize("texts", [("user",), ("assistant",), ("system",), ("user", "system"), ("assistant", "system")])
def test_a_template_may_want_parts_of_some_roles_alone(tokenizer, texts):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role in TEXTS %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ).replace("TEXTS", str(list(texts)))
    messages = [SYSTEM, *TURNS]
    for given in (messages, in_parts(messages)):
        example = one({"messages": given}, tokenizer, chat_template=template)
        assert text(example, tokenizer) == tokenizer.apply_chat_template(messages, chat_template=CHATML, tokenize=False)


def test_what_a_template_wants_is_found_out_once(tokenizer, monkeypatch):
    rendered = []
    apply = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **kw: (rendered.append(kw), apply(*args, **kw))[1]
    )
    template = Template.of(tokenizer, LOOPING)
    template.text(TURNS, "a row")
    probing = len(rendered)
    template.text(TURNS * 3, "a row")
    assert len(rendered) == probing + 1


def test_parts_of_images_and_templates_that_write_no_content_are_refused(tokenizer):
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    message = fault([{"messages": [image, ASSISTANT]}], tokenizer, chat_template=LOOPING)
    assert message.startswith("candidates, row 0: message 0 of column messages: expected a text as content, or parts")
    silent = LOOPING.replace("{{line['text']}}", "")
    assert "does not write the content" in fault([ROW], tokenizer, chat_template=silent)


def test_invalid_rows_are_left_out_beside_rows_in_parts(tokenizer):
    rows = [{"messages": in_parts([USER])}, {"messages": in_parts(TURNS)}]
    encoded = encode(rows, tokenizer, chat_template=LOOPING, invalid_rows="skip")
    assert encoded.skipped == {0: "invalid"} and [example.index for example in encoded.examples] == [1]


@pytest.mark.parametrize("template", [LOOPING, SELECTING, UNMARKED])
def test_prompts_of_the_loop_are_written_in_parts(template):
    asking = byte_level(template=template)

    def expected(messages):
        return asking.apply_chat_template(in_parts(messages), tokenize=False, add_generation_prompt=True)

    assert ask(asking, USER["content"]) == expected([USER])
    assert converse(asking, TURNS[:3]) == expected(TURNS[:3])


def test_an_instruction_in_parts_is_read_as_a_text():
    content = [{"type": "text", "text": "What is two"}, {"type": "text", "text": " and two?"}]
    rows = Rows([{"messages": [{"role": "user", "content": content}, ASSISTANT]}], source="seeds.jsonl")
    assert instruction_text(rows) == [USER["content"]]
