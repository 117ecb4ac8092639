"""A model as judge: grades, choices in both orders, replies without a verdict."""

from __future__ import annotations

import numpy as np
import pytest
from loop_models import make_teacher, make_word_tokenizer

from montessori.errors import DataError
from montessori.loop.engines import BatchedEngine, Sample
from montessori.loop.judge import Judge, JudgeSettings, open_judge, read_choice, read_grade


class Replies(BatchedEngine):
    """An engine that replies with what `reply` makes of the prompt."""

    tokenizer = make_word_tokenizer()

    def __init__(self, reply):
        self.reply, self.calls = reply, 0

    def load(self, model):
        pass

    def release(self):
        pass

    def fits(self, prompt):
        return len(prompt) < 2000

    def batches(self, requests):
        return [list(requests)]

    def generate(self, requests, sampling, stop=()):
        self.calls += 1
        return [Sample(self.reply(request.prompt), 2, "stop") for request in requests]


def judge(reply, folder):
    return Judge(JudgeSettings(model="m"), Replies(reply), folder)


def test_grades_are_read_from_replies(tmp_path):
    rows = [{"instruction": f"I {text}", "response": text} for text in ("7", "Grade: 10/10.", "none", "11", "3 of 10")]
    found = judge(lambda prompt: prompt.partition("Answer:\n")[2].partition("\n")[0], tmp_path).grade(rows)
    np.testing.assert_equal(found, [7, 10, np.nan, np.nan, 3])


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("8/10", 8),
        ("**7**", 7),
        ("8.5", 8.5),
        ("Grade: 8. The answer has 2 mistakes.", 8),
        ("On a scale of 1 to 10, I give this a 8.", 8),
        ("It has 2 mistakes in 3 lines.", np.nan),
        ("-3", np.nan),
        ("42", np.nan),
        ("4-5", np.nan),
        ("3. 8", 8),
        ("8. It is clear.", 8),
        ("4/5", np.nan),
        ("4 out of 5", np.nan),
        ("8/100", np.nan),
        ("5%", np.nan),
        ("6 or 7", np.nan),
        ("6~7", np.nan),
        ("7,5", np.nan),
        ("7½", np.nan),
        ("2 of the 3 steps are wrong. Grade: 8", 8),
        ("3 reasons why this is bad. Score: **2**/10", 2),
        ("Grade: 7. There are 2-3 slips", 7),
        ("Grade: 7. No, grade: 3", np.nan),
        ("The answer has 2 errors.", np.nan),
        ("Grade: N/A. The 2 statements", np.nan),
        ("Less than 5", np.nan),
        ("I'd give it an 8.", 8),
        ("9 (excellent)", 9),
        ("9\n\nIt has 3 points.", 9),
        ("8 because 3 of 4 facts are right", 8),
    ],
)
def test_a_scale_is_no_grade(reply, grade):
    np.testing.assert_equal(read_grade(reply), grade)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("A", 1),
        ("**B**", 0),
        ("Answer A is better than B.", 1),
        ("A is better", 1),
        ("B\n\nA is wrong.", 0),
        ("A better answer is B.", 0),
        ("I choose B over A", 0),
        ("A tie.", 0.5),
        ("Both A and B are equal: tie", 0.5),
        ("A and B are equal", np.nan),
        ("A nice question", np.nan),
        ("A. B is wrong.", np.nan),
        ("B is worse than A.", np.nan),
        ("A is wrong; B is correct.", np.nan),
        ("A is incorrect.", np.nan),
        ("Answer A is wrong", np.nan),
        ("Answer A is not better than Answer B", np.nan),
        ("B has an error, so A is better", np.nan),
        ("B gives wrong facts. A is right", np.nan),
        ("A isn't as good as B", np.nan),
        ("It is not a tie. B.", np.nan),
        ("tie-breaker: A", 1),
        ("Answer B has an error.\n\nVerdict: A", 1),
        ("Both have flaws.\n**Better answer: B**", 0),
        ("Worse answer: A", np.nan),
        ("A provides a clearer and more helpful answer than B.", 1),
        ("B provides a clearer and more helpful answer than A.", 0),
        ("I think A answers the question better than B.", 1),
        ("While A is shorter, B is better than A.", 0),
        ("A is longer than B", np.nan),
        ("A is hardly better than B", np.nan),
        ("A over B", 1),
        ("I would choose B rather than A", 0),
        ("A beats B", 1),
        ("A >> B", 1),
        ("A is good, but B is better", np.nan),
        ("A is slightly longer; B is better.", np.nan),
        ("A follows the instruction but B is clearer", np.nan),
        ("A is fine. Better: B", 0),
        ("A is more verbose. I prefer B.", 0),
        ("A is equal to B", np.nan),
        ("A is as good as B", np.nan),
        ("A as good as B", np.nan),
        ("B because answer A rambles", 0),
        ("A stays on topic, B drifts.", np.nan),
        ("The answer A gives is vague; B is better", np.nan),
        ("The loser: A", np.nan),
        ("The winner is **A**", 1),
        ("A\nB", np.nan),
        ("A\n\nB is worse", 1),
        ("Judging by length A, by content B", np.nan),
        ("tie, leaning A", np.nan),
        ("A?", np.nan),
        ("A is longer.", np.nan),
        ("A does it better; B is longer", np.nan),
        ("I'd pick A.", 1),
        ("Option B", 0),
    ],
)
def test_an_article_is_no_verdict(reply, value):
    np.testing.assert_equal(read_choice(reply), value)


@pytest.mark.parametrize(
    "verdict",
    [
        "{} provides a clearer answer than {}.",
        "{} answers the question better than {}.",
        "I prefer {} to {}",
        "{}, since {} rambles",
        "{} is more helpful than {}",
    ],
)
def test_a_sentence_counts_alike_for_both(verdict):
    assert (read_choice(verdict.format("A", "B")), read_choice(verdict.format("B", "A"))) == (1, 0)


def test_preferences_are_ours_in_both_orders(tmp_path):
    def longer(prompt):
        first, _, second = prompt.partition("Answer A:\n")[2].partition("\n\nAnswer B:\n")
        second = second.partition("\n")[0]
        return "tie" if len(first) == len(second) else f"Answer {'A' if len(first) > len(second) else 'B'}."

    ours, theirs = ["long answer", "x", "same"], ["short", "much longer", "same"]
    assert judge(longer, tmp_path).prefer(["?"] * 3, ours, theirs) == ([1, 0, 0.5], [1, 0, 0.5])
    # A judge that always takes the first shows its bias.
    assert judge(lambda _: "A", tmp_path).prefer(["!"], ["x"], ["y"], name="other") == ([1], [0])


def test_replies_without_a_verdict_count_as_ties_unless_all_are(tmp_path):
    one = judge(lambda prompt: "a riddle" if "Answer A:\nx\n" in prompt else "B is a better one", tmp_path)
    assert one.prefer(["?"], ["x"], ["y"]) == ([0.5], [1]) and one.unread == 1
    with pytest.raises(DataError, match="judge m: expected a grade from 1 to 10 in a reply, got none"):
        judge(lambda _: "fine", tmp_path).grade([{"instruction": "?", "response": "x"}])


def test_what_is_too_long_to_be_judged_counts_as_unread(tmp_path):
    one = judge(lambda _: "A", tmp_path)
    assert one.prefer(["?", "?"], ["x", "x" * 2000], ["y", "y"]) == ([1, 0.5], [0, 0.5])
    assert one.unread == 2


def test_replies_on_disk_are_not_asked_for_again(tmp_path):
    rows = [{"instruction": "?", "response": "x"}]
    judge(lambda _: "4", tmp_path).grade(rows)
    again = judge(lambda _: "9", tmp_path)
    assert again.grade(rows).tolist() == [4] and again.engine.calls == 0


def test_a_judge_is_loaded_from_a_checkpoint(tmp_path):
    settings = JudgeSettings(model=str(make_teacher(tmp_path / "model")), chat_template="plain")
    with open_judge(settings, tmp_path) as loaded, pytest.raises(DataError, match="expected A, B or tie"):
        loaded.prefer(["say"], ["hello"], ["world"])
