"""Instructions: where they are found, which are kept."""

from __future__ import annotations

import random

import pytest
from rapidfuzz import process
from support import WORDS, make_tokenizer

from montessori.data import Rows
from montessori.errors import ArgumentError, DataError
from montessori.loop.filters import FilterSettings, RougeIndex
from montessori.loop.prompts import (
    CLOSE,
    OPEN,
    ask,
    chat_prompt,
    completion_prompt,
    find_instruction,
    instruction_text,
    user_turns,
)


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        (None, "marks_missing"),
        ("", "empty"),
        ("Hello", "too_short"),
        ("Hello!", None),
        ("a" * 400, None),
        ("a" * 401, "too_long"),
        ("Describe the Image above.", "blocked_word"),
        ("Imagine a mapping of profiles.", None),
        ("Please go to the shop.", "blocked_word"),
        ("- name two birds", "leading_punctuation"),
        ("$5 in euros, please", "leading_punctuation"),
        ("État des lieux", "leading_non_ascii"),
        ("7 facts about owls", None),
        ("Translate: État", None),
    ],
)
def test_each_filter_names_its_reason(instruction, reason):
    assert FilterSettings().rejection(instruction) == reason


def test_filters_are_settings():
    settings = FilterSettings(
        min_characters=1, blocked_words=(), no_leading_punctuation=False, no_leading_non_ascii=False
    )
    for text in ("Hi", "Draw an image", "- x", "É"):
        assert settings.rejection(text) is None
    assert FilterSettings(blocked_words=("c++",), min_characters=1).rejection("see x") is None


@pytest.mark.parametrize(
    ("word", "instruction", "blocked"),
    [
        ("c++", "Write a c++ program", True),
        ("C#", "Write it in c#, please", True),
        ("C#", "Write it in abc#", False),
        ("$5", "Give me $5 now", True),
        ("$5", "Give me $50 now", False),
        ("go to", "Now go  to the shop", True),
        ("go to", "Now go\nto the shop", True),
        ("图片", "请描述这张图片里的内容", True),
        ("karte", "Beschreibe die Landkarte", False),
    ],
)
def test_a_blocked_word_is_whole_where_its_ends_can_be_seen(word, instruction, blocked):
    settings = FilterSettings(blocked_words=(word,), no_leading_non_ascii=False)
    assert settings.rejection(instruction) == ("blocked_word" if blocked else None)


def test_an_empty_word_blocks_nothing_and_is_refused():
    with pytest.raises(ArgumentError, match="blocked_words: expected words, got an empty one"):
        FilterSettings.read({"blocked_words": ["map", " "]}, "x")


def slow_rouge(a: str, b: str) -> float:
    """ROUGE-L F by the textbook recursion."""
    x, y = a.lower().split(), b.lower().split()
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, left in enumerate(x):
        for j, right in enumerate(y):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if common == 0:
        return 0.0
    precision, recall = common / len(x), common / len(y)
    return 2 * precision * recall / (precision + recall)


def test_rouge_agrees_with_the_definition():
    generator = random.Random(3)
    texts = [" ".join(generator.choices(WORDS[:6], k=generator.randint(1, 12))) for _ in range(60)]
    for threshold in (0.3, 0.7, 0.9):
        index = RougeIndex(threshold)
        for text in texts:
            expected = any(slow_rouge(text, other) > threshold + 1e-9 for other in texts[: len(index)])
            assert index.is_close(text) == expected
            index.add(text)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1 / 3, 0.5, 0.7, 0.9, 1.0])
def test_rouge_finds_what_a_comparison_with_every_text_finds(threshold):
    generator = random.Random(threshold)
    # Common words and rare ones, as texts have them, and texts without a word.
    common, rare = [f"w{number}" for number in range(4)], [f"r{number}" for number in range(60)]
    texts = [
        " ".join(generator.choice(common if generator.random() < 0.4 else rare) for _ in range(generator.randrange(12)))
        for _ in range(150)
    ]
    for place in range(0, 150, 2):
        # And some that differ in a word or two.
        words = texts[place].split()
        texts[place + 1] = " ".join([*generator.sample(words, max(0, len(words) - generator.randrange(3))), "w0"])
    index = RougeIndex(threshold)
    for place, text in enumerate(texts):
        plain = any(RougeIndex(threshold).is_close(text, [other]) for other in texts[:place])
        assert index.is_close(text) == plain
        index.add(text)


def test_rouge_compares_with_texts_that_share_words_alone(monkeypatch):
    index = RougeIndex(0.7, [f"the w{number} x{number} y{number} z{number}" for number in range(1000)])
    compared = []
    extract = process.extractOne

    def counted(query, texts, **options):
        compared.append(len(texts))
        return extract(query, texts, **options)

    monkeypatch.setattr(process, "extractOne", counted)
    assert index.is_close("the w17 x17 y17 z18")
    assert sum(compared) <= 2


def test_rouge_of_exactly_the_threshold_is_kept():
    # 7 words of 10 in common: F is 0.7.
    common = "a b c d e f g"
    assert not RougeIndex(0.7, [f"{common} h i j"]).is_close(f"{common} x y z")
    assert RougeIndex(0.7, [f"{common} h i"]).is_close(f"{common} x y z")


def test_rouge_ignores_case_and_punctuation_and_takes_other_scripts():
    index = RougeIndex(0.7, ["Name a blue bird!", "Назови синюю птицу"])
    assert index.is_close("name a BLUE bird?")
    assert index.is_close("назови синюю птицу.")
    assert not index.is_close("вырасти красную розу")
    assert index.is_close("something else", others=["Something, else"])


@pytest.mark.parametrize(
    ("text", "close", "far"),
    [
        ("请写一首关于春天的诗", "请写一首关于春天的诗吧", "列出五种健康的早餐"),
        ("春についての詩を書いてください", "春についての詩を書いて", "健康的な朝食を五つ挙げてください"),
        ("เขียนบทกวีเกี่ยวกับฤดูใบไม้ผลิ", "เขียนบทกวีเกี่ยวกับฤดูใบไม้ผลิสั้น", "ห้าเมนูอาหารเช้า"),
        ("naïve café", "nai\u0308ve cafe\u0301", "naive cafe"),
    ],
)
def test_rouge_sees_texts_without_blanks_and_composed_otherwise(text, close, far):
    index = RougeIndex(0.7, [text])
    assert index.is_close(close) and not index.is_close(far)


def test_instructions_are_found_between_the_marks():
    chat = f"I choose birds.\n{OPEN} Name a bird.\nOne word. {CLOSE}"
    assert find_instruction(chat, "chat") == "Name a bird.\nOne word."
    assert find_instruction(f"Name a bird.{CLOSE}", "chat") is None
    assert find_instruction(f"I could write {OPEN} but: {OPEN}Name a bird.{CLOSE}", "chat") == "Name a bird."
    assert find_instruction(f" Name A bird. {CLOSE}", "completion") == "Name A bird."
    assert find_instruction("Name a bird.", "completion") is None
    assert find_instruction(f"Name {OPEN} a bird{CLOSE}", "completion") is None
    assert find_instruction(CLOSE, "completion") == ""


def test_prompts_hold_their_examples_and_end_where_the_teacher_goes_on():
    tokenizer = make_tokenizer()
    examples = ["name a {colour}", "say hello"]
    completion = completion_prompt(tokenizer, examples)
    assert completion.endswith(f"{OPEN}say hello{CLOSE}\n{OPEN}")
    chat = chat_prompt(tokenizer, examples)
    assert chat.endswith("<|im_start|> assistant ")
    assert all(f"{OPEN}{example}{CLOSE}" in text for example in examples for text in (chat, completion))


def test_a_tokenizer_without_a_chat_template_needs_one():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ask(tokenizer, "say hello")
    assert ask(tokenizer, "say hello", chat_template="plain") == "say hello\n"


def test_instructions_of_all_kinds_of_rows():
    rows = Rows(
        [
            {"instruction": "Add.", "input": "2 and 3"},
            {"instruction": "Say hello.", "input": "", "output": "unused"},
            {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]},
            {"prompt": "Two?", "completion": "2"},
            {"messages": [{"role": "user", "content": "Without an answer?"}]},
        ],
        "seeds.jsonl",
    )
    assert instruction_text(rows) == ["Add.\n\n2 and 3", "Say hello.", "Hi?", "Two?", "Without an answer?"]
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."},
             {"role": "user", "content": "And two?"}]  # fmt: skip
    rows = Rows([{"messages": turns}, {"instruction": "Add.", "history": [["Hello?", "Yes."]]}], "seeds.jsonl")
    assert user_turns(rows) == [["Hi?", "And two?"], ["Add.", "Hello?"]]
    with pytest.raises(DataError, match=r"seeds\.jsonl, row 0"):
        instruction_text(Rows([{"text": "x"}], "seeds.jsonl"))
    with pytest.raises(ArgumentError, match="rouge"):
        FilterSettings.read({"rouge": 2}, "x")
