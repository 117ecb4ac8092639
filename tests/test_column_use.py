"""Which columns are read is said in one line, and thoughts that a template passes over are warned of."""

import json
import warnings

import pytest
import torch
from encoding_support import CHATML, MARKED, ROW, TURNS, USER, byte_level, encode
from support import options

from montessori import Scores
from montessori.column_use import column_lines, column_use
from montessori.errors import DataWarning
from montessori.files import Rows


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(eos_token="<|im_end|>")


def line(*rows):
    return column_use(Rows(rows, "a.jsonl")).line("a.jsonl")


QUESTION = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"text": "a", "code": "b", "task_id": 0}, "text (1 row); not read: code, task_id"),
        ({"text": "a", "worth": torch.tensor(2.0), "empty": []}, "text (1 row); not read: worth"),
        ({"text": "a", "role": "prompter", "parent_id": None}, "text (1 row); not read: role"),
        ({"question": "a", "solution": "b", "attempt": "c"}, "question + solution (1 row); not read: attempt"),
        ({**QUESTION, "input": "c", "system": "d", "history": [["e", "f"]]}, "instruction + output (1 row)"),
        ({**QUESTION, "input": "c", "context": "d"}, "instruction + output (1 row); not read: context"),
        ({**QUESTION, "input": " ", "context": "d"}, "instruction + output (1 row)"),
        ({"prompt": "a", "completion": "b", "label": False}, "prompt + completion (1 row); not read: label"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "prompt + completion (1 row); not read: input"),
        ({"prompt": "a", "completion": "b", "tools": ["saw"]}, "prompt + completion (1 row); not read: tools"),
        ({"messages": TURNS, "tools": [{"name": "add"}], "images": []}, "messages (1 row)"),
        ({"messages": TURNS, "chat_template_kwargs": {"a": 1}, "id": ""}, "messages (1 row)"),
        ({"text": "a", "tools": [{"name": "add"}]}, "text (1 row); not read: tools"),
        (
            {"input_ids": [1], "labels": [1], "attention_mask": [1], "completion_mask": [1], "position_ids": [0]},
            "input_ids + labels (1 row); not read: completion_mask",
        ),
        ({"input_ids": [1], "completion_mask": [1], "assistant_masks": [1]}, "input_ids + completion_mask (1 row)"),
    ],
)
def test_what_is_read_and_what_is_not_is_one_line(row, read):
    assert line(row) == f"a.jsonl: read as {read}"


def test_rows_of_several_kinds_are_counted():
    rows = [{"text": "a", "id": "1"}, *[{**ROW, "id": "2"}] * 3, {"messages": TURNS, "source": "b", "id": "3"}, {}]
    assert line(*rows) == (
        "a.jsonl: read as instruction + response (3 rows), messages (1 row), text (1 row); not read: id, source (1 row)"
    )
    many = line({"text": "a", **{f"column {number:03}\n": 1 for number in range(200)}})
    assert "\n" not in many and many.endswith("...") and len(many) < 320
    assert column_lines([Rows([{}], "b.jsonl"), Rows([ROW], "c.jsonl")]) == [
        "c.jsonl: read as instruction + response (1 row)"
    ]


def test_what_is_said_is_what_is_read(tokenizer):
    """A column is named as not read where its value changes nothing, and not where it does."""
    rows = [
        {**QUESTION, "input": "c", "context": "d", "system": "e", "other": "f"},
        {"text": "a", "system": "e", "input": "c"},
        {"messages": TURNS, "system_prompt": "e", "prompt": "a", "completion": "b"},
    ]
    for row in rows:
        unread = column_use(Rows([row], "a.jsonl")).unread
        for column in row:
            changed = {**row, column: f"{row[column]} more"} if column != "messages" else {**row, column: TURNS[:2]}
            same = [encode([one], tokenizer).examples[0].input_ids.tolist() for one in (row, changed)]
            assert (same[0] == same[1]) == (column in unread), column


def test_a_command_says_how_it_reads_each_file(run, student, files, tmp_path):
    rows = [{"text": "say hello", "code": "blue", "task_id": number} for number in range(1, 5)]
    files["candidates"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "candidates.jsonl: read as text (4 rows); not read: code, task_id\n"
    out = tmp_path / "scores.parquet"
    status, shown, error = run("score", *options(student, files), "--out", out, "--quiet")
    assert status == 0 and error == said + "reference.jsonl: read as instruction + response (12 rows)\n", error
    assert Scores.load(out).info["columns"] == {"read": {"text": 4}, "not_read": {"code": 4, "task_id": 4}}
    words = ["--student", student, "--data", files["candidates"], "--out", tmp_path / "warm", "--max-steps", 1]
    status, shown, error = run("warmup", *words, "--batch-size", 4, "--quiet")
    assert status == 0 and error == said and "read as" not in shown


THINKING = {"role": "assistant", "content": "It is four.", "reasoning_content": "Two twice."}
WRITING = CHATML.replace("+ message['content']", "+ (message.reasoning_content or '') + message['content']")


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_a_template_passes_over_are_warned_of_once(tokenizer, template, key):
    last = {"role": "assistant", "content": "It is four.", key: "Two twice."}
    rows = [{"messages": [USER, last]}, ROW, {"prompt": [USER], "completion": [last]}]
    with pytest.warns(DataWarning) as caught:
        encoded = encode(rows, tokenizer, chat_template=template)
    (warning,) = caught
    assert str(warning.message).startswith(
        f"candidates, row 0: the chat template does not write the thoughts in {key} of the last message (nor those of "
        "1 other row), and"
    )
    assert len(encoded.examples) == 3


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (WRITING, [USER, THINKING]),
        # Another form of them is written, or they stand in the content as well.
        (WRITING.replace("(message.reasoning_content or '')", "(message.reasoning_content or '') | upper"),
         [USER, THINKING]),
        (CHATML, [USER, {**THINKING, "content": "<think>Two twice.</think>It is four."}]),
        # Of earlier turns they are left out on purpose.
        (CHATML, [USER, THINKING, *TURNS[2:]]),
        (CHATML, [USER, {**THINKING, "reasoning_content": None}]),
        (CHATML, [USER, {**THINKING, "reasoning_content": " "}]),
    ],
)  # fmt: skip
def test_thoughts_that_are_written_or_are_not_of_the_last_turn_are_no_matter(tokenizer, template, messages):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encode([{"messages": messages}], tokenizer, chat_template=template).examples) == 1
