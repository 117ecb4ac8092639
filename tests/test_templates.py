"""Chat templates: which one is taken, what it is told, and where its text is cut."""

import json
import re
from pathlib import Path

import pytest
from encoding_support import (
    ASSISTANT,
    CHATML,
    MARKED,
    OPEN_ENDED,
    ROW,
    TEXT,
    THOUGHTFUL,
    THOUGHTLESS,
    THOUGHTS,
    TURNS,
    USER,
    byte_level,
    fault,
    one,
    runs,
    text,
)

from montessori.errors import ArgumentError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


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


def test_a_template_may_lie_in_the_home_of_the_user(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert text(one(ROW, tokenizer, chat_template="~/chat.jinja"), tokenizer) == TEXT


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
        ("{{ messages[-1].content | length }}" + THOUGHTFUL, TURNS, "rewrites the turn or what comes before it"),
        (THOUGHTFUL.replace("m.content +", "m.content + m.content +"), TURNS, "rewrites the turn or what comes before"),
        (OPEN_ENDED, TURNS, "ends a turn differently when a message follows, without a special token there, at"),
        (THOUGHTLESS, THOUGHTS[:2], "drops a part of the content at message 1"),
        (THOUGHTLESS, THOUGHTS, "drops a part of the content at message 3"),
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


@pytest.mark.parametrize(
    ("template", "messages", "written"),
    [
        (THOUGHTFUL, TURNS, ["It is four.", "<think></think>Six."]),
        (THOUGHTFUL, [*TURNS, USER], ["It is four.", "Six."]),
        (CHATML + "{{ 'Hm' if add_generation_prompt }}", TURNS, ["It is four.", "Six."]),
        # A generation prompt that opens the thoughts, as those of reasoning models do.
        (THOUGHTFUL + "{{ '<think>' if add_generation_prompt }}", TURNS, ["It is four.", "</think>Six."]),
        (CHATML.split("{% if")[0], TURNS, ["It is four.", "Six."]),
        (THOUGHTLESS, TURNS, ["It is four.", "Six."]),
        (THOUGHTLESS, [*THOUGHTS[:2], *TURNS[:2]], ["It is four.", "It is four."]),
        (THOUGHTFUL + "{{ bos_token if not add_generation_prompt }}", TURNS, ["It is four.", "<think></think>Six."]),
        # A header that the user wrote is none.
        (THOUGHTLESS, [{"role": "user", "content": "<|im_start|>assistant\n<think>"}, ASSISTANT], ["It is four."]),
        (
            THOUGHTFUL,
            [USER, {"role": "assistant", "content": " Four. \n"}, *TURNS[2:]],
            ["Four. \n", "<think></think>Six."],
        ),
    ],
)
def test_turns_that_are_rewritten_later_are_found_in_the_whole(template, messages, written):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<s>", bos_token="<s>")
    example = one({"messages": messages}, tokenizer, chat_template=template)
    assert text(example, tokenizer) == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert [run.removesuffix("<s>").strip() for run in runs(example, tokenizer)] == [
        f"{part}<|im_end|>" for part in written
    ]


def test_a_generation_prompt_in_an_earlier_turn_does_not_begin_the_answer(tokenizer):
    template = THOUGHTLESS.replace("+ m.content", "+ ('<think>' if loop.index == 2 else '') + m.content")
    # "And?" stands before that turn as well.
    turns = [{"role": "user", "content": "And? Two and two?"}, *TURNS[1:]]
    for row in ({"prompt": turns[:3], "completion": turns[3:]}, {"messages": turns}):
        example = one(row, tokenizer, chat_template=template)
        assert runs(example, tokenizer)[-1] == "Six.<|im_end|>"


CALLING = ("gptoss", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507")
ANSWERING = (*CALLING, "cohere", "deepseek_r1_distill", "deepseekv3", "gemma", "llama3", "phi3", "phi3_5")
# Loop over the parts of a content.
PARTED = ("idefics3", "llava_next", "smolvlm")


def called(name):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": {"a": 2}}}]}


RETURNED = {"role": "tool", "name": "add", "content": "4"}
CALLS = [USER, called("add"), RETURNED, ASSISTANT, *TURNS[2:3], called("subtract"), RETURNED, *TURNS[3:]]


@pytest.mark.parametrize(
    ("name", "messages"), [*((name, TURNS) for name in (*ANSWERING, *PARTED)), *((name, CALLS) for name in CALLING)]
)
def test_real_templates_are_cut_where_their_marked_versions_mark(name, messages):
    """TRL keeps templates of many models, and versions of them that mark what the assistant writes."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    files = [folder / f"{name}.jinja", folder / f"{name}_training.jinja"]
    if not all(file.is_file() for file in files):
        pytest.skip(f"this TRL has no {name}")
    special = {
        token for file in files for token in re.findall(r"<[|｜][^|｜>]*[|｜]>|</?s>|<\w+_of_turn>", file.read_text())
    }
    tokenizer = byte_level("<s>", "</s>", *sorted(special - {"<s>", "</s>"}), bos_token="<s>", eos_token="</s>")
    found, marked = (runs(one({"messages": messages}, tokenizer, chat_template=str(file)), tokenizer) for file in files)
    turns = [message for message in messages if message["role"] == "assistant"]
    written = [turn["content"] or turn["tool_calls"][0]["function"]["name"] for turn in turns]
    assert len(found) == len(marked) == len(written)
    for ours, theirs, content in zip(found, marked, written, strict=True):
        # Marked versions may mark the header, and thoughts where there are none.
        assert content in ours and theirs.rstrip().endswith(ours.strip())


# As those of Qwen3 and GLM-4.5 write them.
REWRITTEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if '</think>' in m.content %}"
    "{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("answer", ["42", r"\boxed{42}", "<answer>42</answer>", "It is 42."])
@pytest.mark.parametrize("thoughts", ["<think>\nIs it 42?\n</think>", "<think>h</think>", "h</think>"])
def test_an_answer_glued_to_its_thoughts_is_read_where_the_template_moves_them_apart(tokenizer, thoughts, answer):
    messages = [USER, {"role": "assistant", "content": thoughts + answer}]
    example = one({"messages": messages}, tokenizer, chat_template=REWRITTEN)
    inside = thoughts.removeprefix("<think>").removesuffix("</think>").strip()
    assert runs(example, tokenizer) == [f"<think>\n{inside}\n</think>\n\n{answer}<|im_end|>"]
    # The same word in the thoughts does not hide that the answer is dropped.
    dropping = REWRITTEN.replace("m.content.split('</think>')[-1].strip() +", "")
    for glue in ("", "\n\n"):
        messages = [USER, {"role": "assistant", "content": thoughts + glue + answer}]
        assert "does not write the content" in fault([{"messages": messages}], tokenizer, chat_template=dropping)


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
    # No name is that of an argument on the way.
    assert told({**ROW, "chat_template_kwargs": {"where": 1, "options": 2, "source": 3}}) == ""
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
    assert runs(one(row, tokenizer, chat_template=rewriting), tokenizer) == ["Six.<|im_end|>"]
    messages = [{**message, "weight": turn == 1} for turn, message in enumerate(TURNS)]
    example = one({"messages": messages}, tokenizer, chat_template=rewriting)
    assert runs(example, tokenizer) == ["It is four.<|im_end|>"]
    marks_last = rewriting.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    assert "writes turns otherwise once others follow" in fault([row], tokenizer, chat_template=marks_last)


ANSWERED = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].name }}"
    "{% for t in messages[loop.index:] %}{{ t.content if t.role == 'tool' }}{% endfor %}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_a_function_returned_has_no_label_where_a_template_writes_it_into_the_call(tokenizer):
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    messages = [USER, call, {"role": "tool", "content": "It is 4."}, {"role": "assistant", "content": "Four."}]
    said = fault([{"messages": messages}], tokenizer, chat_template=ANSWERED)
    assert "writes what a function returned into a turn of the assistant at message 2" in said
    apart = [messages[0], {**call, "weight": 0}, *messages[2:]]
    assert runs(one({"messages": apart}, tokenizer, chat_template=ANSWERED), tokenizer) == ["Four.<|im_end|>"]


@pytest.mark.parametrize("role", ["ipython", "environment", "function", "observation"])
def test_what_a_function_returned_may_have_the_role_that_the_template_knows(tokenizer, role):
    messages = [USER, ASSISTANT, {"role": role, "content": "It is 4."}, {"role": "assistant", "content": "Four."}]
    for template in (CHATML, MARKED):
        example = one({"messages": messages}, tokenizer, chat_template=template)
        assert f"<|im_start|>{role}\nIt is 4.<|im_end|>" in text(example, tokenizer)
        assert runs(example, tokenizer) == ["It is four.<|im_end|>", "Four.<|im_end|>"]
    known = "['user', 'assistant', 'tool']"
    silent = CHATML.replace("in messages %}", f"in messages if message.role in {known} %}}")
    refusing = CHATML.replace(
        "in messages %}", f"in messages %}}{{{{ raise_exception('role') if message.role not in {known} }}}}"
    )
    for template in (silent, refusing):
        said = fault([{"messages": messages}], tokenizer, chat_template=template)
        assert said.startswith(f"candidates, row 0: the chat template writes no message of the role {role}; write what")
        assert "as tool" in said
    inside = (
        "{% for m in messages if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ messages[2].content if loop.index == 2 and messages | length > 2 and messages[2].role != 'user' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    said = fault([{"messages": messages}], tokenizer, chat_template=inside)
    assert "writes what a function returned into a turn of the assistant at message 2" in said


def test_a_role_is_known_where_the_template_quotes_its_content(tokenizer):
    # As that of Llama 3.1 does.
    quoting = CHATML.replace("+ message['content'] +", "+ (message.content | tojson if message.role == 'ipython' else "
                             "message.content) +")  # fmt: skip
    messages = [USER, ASSISTANT, {"role": "ipython", "content": "4"}, {"role": "assistant", "content": "Four."}]
    example = one({"messages": messages}, tokenizer, chat_template=quoting)
    assert '<|im_start|>ipython\n"4"<|im_end|>' in text(example, tokenizer)
    assert runs(example, tokenizer) == ["It is four.<|im_end|>", "Four.<|im_end|>"]


CHANNELS = (
    "{% for m in messages %}{% if m.thinking and loop.last %}"
    "{{ '<|im_start|>assistant<think>' + m.thinking + '<|im_end|>' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '<say>' + m.content + ('END' if loop.last else '<|im_end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def test_a_turn_begins_with_the_first_of_its_channels(tokenizer):
    messages = [*TURNS[:3], {**TURNS[3], "thinking": "Hm."}]
    example = one({"messages": messages}, tokenizer, chat_template=CHANNELS)
    assert runs(example, tokenizer) == [
        "<say>It is four.<|im_end|>",
        "<think>Hm.<|im_end|><|im_start|>assistant<say>Six.END",
    ]


NO_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' if m.role == 'assistant' }}"
    "{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think></think>' }}{% endif %}"
)


def test_thoughts_beside_the_content_are_labelled_as_those_in_it_are(tokenizer):
    answer = {"role": "assistant", "content": "Four.", "reasoning_content": "Hm."}
    example = one({"messages": [USER, answer]}, tokenizer, chat_template=NO_THINKING)
    assert runs(example, tokenizer) == ["<think>Hm.</think>Four.<|im_end|>"]
    del answer["reasoning_content"]
    example = one({"messages": [USER, answer]}, tokenizer, chat_template=NO_THINKING)
    assert runs(example, tokenizer) == ["Four.<|im_end|>"]
