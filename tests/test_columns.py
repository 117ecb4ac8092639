"""What the columns of a row say, and one line for those that say it wrongly."""

import json

import datasets
import numpy
import pytest
import torch

from montessori.columns import column_set, read_chat, read_text
from montessori.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TURNS = [USER, ASSISTANT]
TEXT_PART = {"type": "text", "text": "i"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


def chat(row):
    return read_chat(row, column_set(row, "data.jsonl, line 2"), 1, "data.jsonl, line 2")


def malformed(row):
    with pytest.raises(DataError) as caught:
        chat(row)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.jsonl, line 2: ")
    return str(caught.value).removeprefix("data.jsonl, line 2: ")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "response": "hello"},
        {"instruction": "hi", "input": None, "response": "hello", "prompt": "another"},
        {"instruction": "hi", "input": " \n", "response": "hello", "messages": None},
        {"prompt": "hi", "completion": "hello", "input": "another"},
        {"messages": TURNS, "prompt": "another", "completion": "another", "input_ids": [1], "labels": None},
        {"instruction": "hi", "input": "", "output": "hello", "text": "another"},
        {"instruction": "hi", "output": "another", "response": "hello"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}], "messages": None},
        {"conversations": TURNS, "instruction": "another", "output": "another"},
        {"messages": [{"from": "human", "value": "hi"}, ASSISTANT]},
        {"prompt": "hi", "response": "hello", "text": "another"},
        {"query": "hi", "response": "hello", "type": "another"},
        {"question": "hi", "answer": "hello", "context": None},
        {"question": "hi", "response": "hello", "answer": "another"},
        {"problem": "hi", "solution": "hello", "answer": "another"},
        {"question": "hi", "solution": "hello", "answer": "another"},
        {"conversations": TURNS, "instruction": "hi", "response": "another"},
        {"conversation": TURNS, "language": "another"},
        {"conversations": ["hi", "hello"]},
        {"messages": json.dumps(TURNS)},
        {"conversations": '[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]', "id": "7"},
        {"instruction": "hi", "response": "hello", "question": "", "answer": ""},
    ],
)
def test_every_set_of_columns_is_a_conversation(row):
    read = chat(row)
    assert (read.index, read.where, read.messages) == (1, "data.jsonl, line 2", TURNS)
    assert read.labelled == (1,)


def test_parts_of_a_content_stay_apart_and_hold_nothing_but_text():
    parts = [{"type": "text", "text": "h", "image": None}, TEXT_PART]
    read = chat({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert read.messages == [{"role": "user", "content": [{"type": "text", "text": "h"}, TEXT_PART]}, ASSISTANT]


@pytest.mark.parametrize("question", ["instruction", "question"])
@pytest.mark.parametrize("context", ["input", "context"])
def test_input_follows_the_instruction_after_a_blank_line(question, context):
    row = {question: "Add.", context: "2, 2", "response": "4"}
    assert chat(row).messages[0] == {"role": "user", "content": "Add.\n\n2, 2"}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "response": "hello"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": TURNS},
        {"messages": [SYSTEM, *TURNS]},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
)
def test_what_a_column_says_for_the_system_begins_the_conversation(row, column):
    read = chat({**row, column: "Be brief."})
    assert (read.messages, read.labelled) == ([SYSTEM, *TURNS], (2,))
    assert chat({**row, column: " "}).messages == chat(row).messages
    assert malformed({**row, column: 5}) == f"expected a text in column {column}, got 5"


def test_two_systems_are_an_error():
    said = malformed({"messages": [SYSTEM, *TURNS], "system": "Be long."})
    assert said.startswith("expected one message of the system, got column system and another in the first message")


def test_columns_that_say_two_things_for_the_system_are_an_error():
    row = {"instruction": "hi", "response": "hello", "system": "Be brief."}
    said = malformed({**row, "system_prompt": "Be long."})
    assert said.startswith("expected one message of the system, got column system and another in column system_prompt")
    for same in ("Be brief.", " Be brief.\n", "", None):
        assert chat({**row, "system_prompt": same}).messages == [SYSTEM, *TURNS]


@pytest.mark.parametrize(
    "row", [{"messages": TURNS}, {"conversations": TURNS}, {"prompt": [USER], "completion": [ASSISTANT]}]
)
def test_earlier_turns_beside_messages_are_an_error(row):
    for history in ([["one", "two"]], "Physics"):
        said = malformed({**row, "history": history})
        assert said.startswith("expected earlier turns in one place, got column history beside column ")
        assert said.endswith(f"write them into {next(iter(row))}, and remove history")
    for history in (None, [], "[]", [["hi", "hello"]]):
        assert chat({**row, "history": history}).messages == TURNS


def test_earlier_turns_come_before_the_question_and_are_labelled():
    history = [["one", "two"], ("three", "four")]
    read = chat({"instruction": "hi", "output": "hello", "history": history, "system": "Be brief."})
    assert [message["content"] for message in read.messages] == [
        "Be brief.", "one", "two", "three", "four", "hi", "hello"
    ]  # fmt: skip
    assert [read.messages[turn]["role"] for turn in read.labelled] == ["assistant"] * 3
    for nothing in (None, [], "", "[]"):
        assert chat({"instruction": "hi", "output": "hello", "history": nothing}).messages == TURNS
    of_csv = {"instruction": "hi", "output": "hello", "history": json.dumps(history), "system": "Be brief."}
    assert chat(of_csv).messages == read.messages
    for wrong in ([["one"]], "one", [{"a": "b"}], ["ab"]):
        assert malformed({"instruction": "a", "output": "b", "history": wrong}).startswith("expected pairs of a ques")
    wrong = malformed({"instruction": "a", "output": "b", "history": [["one", ""]]})
    assert wrong.startswith("turn 0 of column history: expected a non-empty text")


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize(
    ("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), (False, None), (numpy.int64(0), numpy.True_), (numpy.False_, 1)]
)
def test_a_message_may_say_that_it_is_not_trained(key, no, yes):
    said = [{**message, key: value} for message, value in zip([*TURNS, *TURNS], (None, no, 0, yes), strict=True)]
    assert chat({"messages": said}).labelled == (3,)
    assert chat({"messages": [USER, {**ASSISTANT, key: no}]}).labelled == ()
    split = {"prompt": [*TURNS, USER], "completion": [{**ASSISTANT, key: yes}, USER, {**ASSISTANT, key: no}]}
    assert chat(split).labelled == (3,)
    for between in (0.5, 2, "1", [1]):
        row = {"messages": [USER, {**ASSISTANT, key: between}], "system": "Be brief."}
        assert malformed(row).startswith(
            f"message 1 of column messages: expected {key} of 0 or 1 (false or true), got "
        )


def test_tools_beside_texts_are_told_and_a_column_of_another_meaning_is_not():
    tools = [{"name": "add", "default": None}]
    row = {"query": "hi", "response": "hello"}
    for given in (tools, json.dumps(tools)):
        assert chat({**row, "tools": given}).variables == {"tools": [{"name": "add"}]}
        with pytest.raises(DataError, match=r"^rows 3: chat_template=.none. has no place for column tools"):
            read_text({**row, "tools": given}, ("query", "response"), 3, "rows 3")
    for other in (["hammer"], "a hammer", 5):
        assert chat({**row, "tools": other}).variables == {}
        assert read_text({**row, "tools": other}, ("query", "response"), 3, "rows 3").labelled == "hello"


def test_what_a_table_fills_structs_with_is_no_part_of_a_row_in_memory_either():
    def call(**arguments):
        return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}

    tools = [{"name": "f", "a": {"type": "string"}}, {"name": "g", "b": None}]
    rows = [{"messages": [USER, call(a=1)], "tools": tools[:1]}, {"messages": [USER, call(b="x")], "tools": tools[1:]}]
    table = datasets.Dataset.from_list(rows)
    for given, listed in zip(rows, list(table), strict=True):
        assert "None" in str(listed)
        assert "None" not in str(chat(listed))
        assert chat(listed).messages == chat(given).messages
        assert chat(listed).variables == chat(given).variables


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"content": "a", "function_call": {"name": "f"}}, "function_call is not read; write it as tool_calls"),
        ({"content": "a", "train_detail": [{"end_offset": 4}]}, "train_detail is not read; label parts of a message"),
        ({"content": "a", "reasoning_content": "x\ud83d"}, "reasoning_content: character 1 is half of a surrogate"),
        ({"content": "", "tool_calls": [{"name": "\ud83d"}]}, "tool_calls: name: character 0 is half of a surrogate"),
    ],
)
def test_what_would_be_lost_in_a_message_is_an_error(message, says):
    assert malformed({"messages": [USER, {"role": "assistant", **message}]}).startswith(
        f"message 1 of column messages: {says}"
    )


def test_half_of_a_character_in_what_a_template_is_told_is_an_error():
    assert malformed({"messages": TURNS, "tools": [{"name": "\ud83d"}]}) == (
        "tools: name: character 0 is half of a surrogate pair, a character cut in two; remove it"
    )


@pytest.mark.parametrize("column", ["image", "images", "video", "audios", "pixel_values"])
@pytest.mark.parametrize("row", [{"messages": TURNS}, {"input_ids": [1, 2], "labels": [1, 2]}, {"text": "a"}])
def test_a_row_that_is_about_more_than_text_is_an_error(row, column):
    for filled in ("cat.png", [b"\x89PNG"], {"bytes": b"a", "path": None}, object(), torch.zeros(3)):
        with pytest.raises(DataError, match=f"^rows 3: expected text alone, got column {column}; leave the row out"):
            column_set({**row, column: filled}, "rows 3")
    for nothing in (None, [], "", " ", "[]", [None], {"bytes": None, "path": None}, False, 0):
        assert column_set({**row, column: nothing}, "rows 3")


@pytest.mark.parametrize("column", ["system", "system_prompt", "history"])
def test_texts_without_a_template_have_no_place_for_more(column):
    row = {"prompt": "a", "completion": "b", column: ["c"]}
    with pytest.raises(DataError, match=f"^rows 3: chat_template='none' has no place for column {column}; name a"):
        read_text(row, column_set(row, "rows 3"), 3, "rows 3")


def test_messages_of_a_prompt_come_before_those_that_are_labelled():
    read = chat({"prompt": [*TURNS, USER], "completion": [ASSISTANT]})
    assert (read.messages, read.labelled) == ([*TURNS, *TURNS], (3,))


def test_token_ids_come_before_text():
    row = {"messages": TURNS, "input_ids": [1], "labels": [1]}
    assert column_set(row, "data.jsonl, line 2") == ("input_ids", "labels")


@pytest.mark.parametrize("call", [{}, {"function": {}}, {"function": "add"}, "add", {"name": ""}])
def test_a_call_without_the_name_of_a_function_is_an_error(call):
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    message = malformed({"messages": [USER, answer]})
    assert message.startswith("message 1 of column messages: expected tool_calls, each with the name of a function")


@pytest.mark.parametrize("tools", ["[{", ["add"], {"name": "add"}, "[1]"])
def test_tools_that_are_no_list_of_schemas_are_an_error(tools):
    assert "in column tools" in malformed({"messages": TURNS, "tools": tools})


def test_missing_columns_are_named():
    message = malformed({"instruction": "a", "answer": "b"})
    expected = (
        "input_ids + labels or input_ids + completion_mask or input_ids + assistant_masks or messages or conversations "
        "or conversation or prompt + completion or instruction + response or instruction + output or prompt + "
        "response or query + response or question + response or question + solution or question + answer or "
        "problem + solution or text"
    )
    assert message == f"expected the columns {expected}, got instruction, answer"
    assert malformed({}).endswith("got none")
    assert malformed("text") == "expected a dict of columns, got str"


@pytest.mark.parametrize("answer", ["", " \n\t", None, 5, ["a"], torch.zeros(3, 3)])
@pytest.mark.parametrize("columns", [("instruction", "response"), ("prompt", "completion"), ("instruction", "output")])
def test_an_empty_response_is_an_error(columns, answer):
    assert malformed(dict(zip(columns, ("question", answer), strict=True))).startswith("expected a ")


@pytest.mark.parametrize("columns", [{"instruction": None}, {"instruction": 5}, {"input": 5}])
def test_a_question_that_is_no_text_is_an_error(columns):
    (column,) = columns
    message = malformed({"instruction": "a", "response": "b", **columns})
    assert message == f"expected a text in column {column}, got {columns[column]}"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "expected a message of the assistant in column messages"),
        ([USER], "expected a message of the assistant in column messages"),
        ("text", "expected a list of messages in column messages, or its JSON text, got 'text'"),
        ("[{", "expected a list of messages in column messages, or its JSON text, got '[{'"),
        ('["hi", "hello"]', "expected a list of messages in column messages, or its JSON text, got "),
        (json.dumps([USER, {**ASSISTANT, "content": 5}]), "message 1 of column messages: expected a text as content"),
        ([USER, "text"], "message 1 of column messages: expected a dict with role and content"),
        (
            [USER, {"role": "assistant"}],
            "message 1 of column messages: expected a dict with role and content",
        ),
        ([{**USER, "role": "bot"}], "message 0 of column messages: expected a role of system, "),
        ([{**USER, "role": ["user"]}], "message 0 of column messages: expected a role of system, "),
        ([{**USER, "role": None}], "message 0 of column messages: expected a role of system, "),
        ([USER, {**ASSISTANT, "content": None}], "message 1 of column messages: expected a text as content"),
        ([{**USER, "content": ["a"]}], "message 0 of column messages: expected a text as content"),
        (
            [{**USER, "content": [TEXT_PART, IMAGE_PART]}],
            "message 0 of column messages: expected a text as content, or",
        ),
        ([{**USER, "content": [{"type": "text"}]}], "message 0 of column messages: expected a text as content, or"),
        ([USER, {**ASSISTANT, "content": []}], "message 1 of column messages: expected a non-empty answer"),
        ([{"from": "function_call", "value": "a"}], "message 0 of column messages: expected from to be one of human, "),
        ([{"from": ["human"], "value": "a"}], "message 0 of column messages: expected from to be one of human, "),
        ([{"from": "human"}], "message 0 of column messages: expected a dict with role and content"),
        ([{"from": "human", "value": None}], "message 0 of column messages: expected a text as content, got None"),
        ([USER, {**ASSISTANT, "content": " "}], "message 1 of column messages: expected a non-empty answer"),
    ],
)
def test_malformed_messages_are_errors(messages, says):
    assert malformed({"messages": messages}).startswith(says)


def test_a_prompt_and_a_completion_are_both_texts_or_both_messages():
    for row in ({"prompt": [USER], "completion": "a"}, {"prompt": "a", "completion": [ASSISTANT]}):
        assert "expected a list of messages" in malformed(row)
    message = malformed({"prompt": TURNS, "completion": [USER]})
    assert message == "expected a message of the assistant in column completion, got none"


def test_speakers_of_sharegpt_have_the_roles_that_templates_know():
    speakers = ("system", "human", "gpt", "observation", "tool", "function", "ipython", "chatgpt")
    row = {"conversations": [{"from": speaker, "value": "a", "weight": 1} for speaker in speakers]}
    read = chat(row).messages
    roles = ["system", "user", "assistant", "tool", "tool", "tool", "ipython", "assistant"]
    assert [message["role"] for message in read] == roles
    assert all(message == {"role": message["role"], "content": "a", "weight": 1} for message in read)
    assert row["conversations"][0] == {"from": "system", "value": "a", "weight": 1}


def test_a_text_counts_where_no_other_set_of_columns_has_a_value():
    where = "data.jsonl, line 2"
    for row in ({"text": "a"}, {"text": "a", "label": 1}, {"text": "a", "messages": None}, {"text": None}):
        assert column_set(row, where) == ("text",)
    for columns in (("instruction", "response"), ("prompt", "completion")):
        row = {columns[0]: "a", columns[1]: None, "text": "a"}
        assert column_set(row, where) == columns
        assert malformed(row).startswith(f"expected a text in column {columns[1]}")
    assert malformed({"text": "a"}) == "expected a conversation, got a text alone in column text"
