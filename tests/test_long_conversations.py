"""Turns of a long conversation are rendered among their neighbours alone, and cut as if all had been rendered."""

import random
from pathlib import Path

import pytest
import trl
from encoding_support import CHATML, OPEN_ENDED, THOUGHTFUL, THOUGHTLESS, byte_level, encode

from montessori import cutting
from montessori.columns import read_chat
from montessori.encoding import _Pieces
from montessori.errors import DataError
from montessori.templates import Template

FOLDER = Path(trl.__file__).parent / "chat_templates"
OWN = {"chatml": CHATML, "open_ended": OPEN_ENDED, "thoughtful": THOUGHTFUL, "thoughtless": THOUGHTLESS}
TEMPLATES = [*sorted(path.stem for path in FOLDER.glob("*.jinja")), *OWN]
KINDS = ("plain", "thoughts", "calls", "weights", "system")


def conversation(kind, seed, exchanges=9):
    """Contents begin and end in ways that templates strip, and some stand twice."""
    draw = random.Random(f"{kind}{seed}")
    edges = ("", " ", "\n")
    said = [draw.choice(edges) + f"word {draw.randrange(5)}" + draw.choice(edges) for _ in range(40)]
    messages = [{"role": "system", "content": "Be brief."}] if kind == "system" else []
    for place in range(exchanges):
        messages.append({"role": "user", "content": said[place % 20]})
        if kind == "calls" and draw.random() < 0.5:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": place}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "add", "content": f"result {place}"})
        answer = {"role": "assistant", "content": said[-(place % 20) - 1]}
        if kind == "thoughts" and draw.random() < 0.7:
            answer["reasoning_content"] = f"Hm {place}."
        if kind == "weights" and place:
            answer["weight"] = draw.randrange(2)
        messages.append(answer)
    return messages


def outcome(messages, template, special, monkeypatch, long):
    monkeypatch.setattr(cutting, "LONG", long)
    try:
        return cutting.cut(read_chat({"messages": messages}, ("messages",), 0, "row 0"), template, special)
    except DataError as error:
        return type(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_windows_cut_as_the_whole_does(name, monkeypatch):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<s>", "</s>", bos_token="<s>", eos_token="</s>")
    source = OWN.get(name) or (FOLDER / f"{name}.jinja").read_text()
    template, special = Template.of(tokenizer, source), _Pieces.of(tokenizer).special
    for kind in KINDS:
        for seed in range(3):
            messages = conversation(kind, seed)
            whole, windows = (outcome(messages, template, special, monkeypatch, long) for long in (1000, 0))
            assert windows == whole, (kind, seed)


def renderings(monkeypatch):
    """Of each rendering from now on, how many messages it has."""
    rendered = []
    apply = Template.apply

    def counted(self, messages, *args, **options):
        rendered.append(len(messages))
        return apply(self, messages, *args, **options)

    monkeypatch.setattr(Template, "apply", counted)
    return rendered


def test_the_time_of_a_conversation_grows_with_its_length_alone(monkeypatch):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "</s>", eos_token="</s>")
    rendered = renderings(monkeypatch)
    counts = []
    for template in (CHATML, THOUGHTFUL):
        for exchanges in (20, 40):
            rendered.clear()
            assert encode(
                [{"messages": conversation("plain", 0, exchanges)}], tokenizer, chat_template=template
            ).examples
            counts.append(sum(rendered))
    assert counts[1] < 2.2 * counts[0] and counts[3] < 2.2 * counts[2]


def test_of_a_question_and_its_answer_both_are_rendered_once(monkeypatch):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "</s>", eos_token="</s>")
    messages = conversation("plain", 0, exchanges=1)
    rendered = renderings(monkeypatch)
    assert encode([{"messages": messages}], tokenizer, chat_template=CHATML).examples
    assert rendered == [1, 2]
    rendered.clear()
    # What follows the last answer is read too.
    thanks = {"role": "user", "content": "thanks"}
    assert encode([{"messages": [*messages, thanks]}], tokenizer, chat_template=CHATML).examples
    assert rendered == [1, 2, 3]
