from __future__ import annotations

import json
import random
import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from loop_support import make_generated, make_signal

from montessori.errors import ArgumentError, DataError
from montessori.loop import pairs
from montessori.loop.pairs import PairSettings
from montessori.loop.signals import SignalSettings, around_median, from_scores
from montessori.scores import Scores


def ids(found):
    return [(pair["chosen_id"], pair["rejected_id"]) for pair in found]


def test_every_helpful_sibling_is_paired_with_every_harmful_one_of_its_prompt(tmp_path):
    rows = make_generated(2)
    signal = make_signal([0.3, -0.1, 0.1, -0.2, 0.5, 0.4, 0.3, 0.2])
    summary = pairs.run(PairSettings(), rows, signal, tmp_path)
    found = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert ids(found) == [
        ("r1-000000-0", "r1-000000-3"),
        ("r1-000000-0", "r1-000000-1"),
        ("r1-000000-2", "r1-000000-3"),
        ("r1-000000-2", "r1-000000-1"),
    ]
    assert found[0]["chosen"] == rows[0]["completion"] and found[0]["rejected"] == rows[3]["completion"]
    assert found[0]["prompt"] == rows[0]["prompt"]
    assert (found[0]["chosen_value"], found[0]["rejected_value"]) == (0.3, -0.2)
    assert (summary["num_pairs"], summary["prompts_without_pairs"], summary["num_prompts"]) == (4, 1, 2)
    assert summary["sign"] == {"positive": 6, "negative": 2, "zero": 0}
    assert summary["prompts_by_num_pairs"] == {"0": 1, "4": 1}


def test_a_shared_drift_is_an_error_that_proposes_centred_and_centred_finds_the_pairs(tmp_path):
    rows = make_generated(1)
    signal = make_signal([1.1, 0.9, 1.2, 0.8], drift=1.0)
    with pytest.raises(DataError, match=r"all are positive.*set pairs\.rule=centred"):
        pairs.run(PairSettings(), rows, signal, tmp_path)
    assert not (tmp_path / "pairs.jsonl").exists()
    assert pairs.run(PairSettings(rule="centred"), rows, signal, tmp_path)["num_pairs"] == 4


def test_margin_per_prompt_budget_and_top_k_keep_the_largest_differences():
    rows, signal = make_generated(2), make_signal([0.4, 0.1, -0.1, -0.4, 0.05, -0.05, 0.0, np.nan])
    make = lambda **settings: ids(pairs.make_pairs(PairSettings(**settings), rows, signal))  # noqa: E731
    assert len(make()) == 5
    assert make(margin=0.5) == [
        ("r1-000000-0", "r1-000000-3"),
        ("r1-000000-0", "r1-000000-2"),
        ("r1-000000-1", "r1-000000-3"),
    ]
    assert make(per_prompt=1) == [("r1-000000-0", "r1-000000-3"), ("r1-000001-0", "r1-000001-1")]
    assert make(top_k=1) == [("r1-000000-0", "r1-000000-3")]
    # Without a sign, the candidate at exactly 0 takes part as well.
    assert len(make(rule="difference")) == 6 + 3


def test_the_same_text_twice_is_no_preference():
    rows = make_generated(1, siblings=2)
    rows[1]["completion"] = rows[0]["completion"]
    assert pairs.make_pairs(PairSettings(), rows, make_signal([1.0, -1.0])) == []


def test_no_pairs_says_why(tmp_path):
    rows = make_generated(3, siblings=1)
    with pytest.raises(DataError, match="no prompt has two candidates"):
        pairs.run(PairSettings(), rows, make_signal([1.0, -1.0, 1.0]), tmp_path)
    with pytest.raises(DataError, match=r"margin 9.*lower pairs\.margin"):
        pairs.run(PairSettings(margin=9.0), make_generated(1), make_signal([1.0, -1.0, 0.5, -2.0]), tmp_path)
    nothing = float("nan")
    with pytest.raises(DataError, match=r"3 of 8 rows that have a value: no prompt has two .*raise score\.max_length"):
        pairs.run(PairSettings(), make_generated(8, siblings=1), make_signal([1.0, 2.0, 3.0, *[nothing] * 5]), tmp_path)
    with pytest.raises(DataError, match=r"0 of 4 rows"):
        pairs.run(PairSettings(), make_generated(1), make_signal([nothing] * 4), tmp_path)
    for rule in ("sign", "centred", "difference"):
        with pytest.raises(DataError, match="all values are the same"):
            pairs.run(PairSettings(rule=rule), make_generated(1), make_signal([0.5] * 4), tmp_path)
    with pytest.raises(DataError, match=r"by rule 'difference' with margin 9 .*: lower pairs\.margin$"):
        pairs.run(PairSettings(rule="difference", margin=9.0), make_generated(1), make_signal([1, 2, 3, 4]), tmp_path)
    with pytest.raises(ArgumentError, match="one value per row"):
        pairs.run(PairSettings(), rows, make_signal([1.0]), tmp_path)


def make_scores(influence, loss, drift=0.5) -> Scores:
    size = len(influence)
    return Scores(
        influence=np.array(influence),
        drift=drift,
        loss=np.array(loss),
        num_tokens=np.full(size, 8),
        num_label_tokens=np.full(size, 4),
        status=np.full(size, "ok", dtype=object),
        reference_loss=2.0,
        names=("reference",),
        method="anchored",
    )


def test_signals_of_scores():
    scores = make_scores([0.6, 0.1, np.nan], [1.0, 3.0, 2.0])
    influence = from_scores(SignalSettings(), scores, seed=0)
    np.testing.assert_allclose(influence.values, [0.6, 0.1, np.nan])
    np.testing.assert_allclose(influence.centred, [0.1, -0.4, np.nan])
    hard = from_scores(SignalSettings(kind="training_loss"), scores, seed=0)
    np.testing.assert_allclose(hard.values, [-1.0, 1.0, 0.0])
    easy = from_scores(SignalSettings(kind="training_loss", prefer="low"), scores, seed=0)
    np.testing.assert_allclose(easy.values, [1.0, -1.0, 0.0])


def test_two_texts_make_one_pair():
    rows = make_generated(1)
    for row, text in zip(rows, "AABC", strict=True):
        row["completion"] = text
    settings = PairSettings(rule="difference", per_prompt=2)
    found = pairs.make_pairs(settings, rows, make_signal([3.0, 2.9, -1.0, -2.0]))
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == [("A", "C"), ("A", "B")]
    # Nor its reverse, where a signal says two things of one text.
    found = pairs.make_pairs(PairSettings(rule="difference"), rows, make_signal([3.0, -3.0, 1.0, -1.0]))
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == [("A", "C"), ("B", "A"), ("B", "C")]


def test_the_random_signal_is_of_the_candidates_that_influence_values():
    scores = make_scores(np.array([0.1, np.nan, 0.3, 0.2]), np.ones(4))
    assert np.isfinite(from_scores(SignalSettings(kind="random"), scores, seed=1).values).tolist() == scores.ok.tolist()


def test_the_random_signal_repeats_with_its_seed():
    scores = make_scores(np.zeros(50), np.zeros(50))
    draws = [from_scores(SignalSettings(kind="random"), scores, seed=seed).values for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert 10 < (draws[0] > 0).sum() < 40


def test_grades_are_centred_on_their_median():
    np.testing.assert_allclose(around_median("judge", [5, np.nan, 1, 3]).values, [2, np.nan, -2, 0])


def plain_pairs(settings, rows, signal):
    """Every pair of siblings, then the largest differences."""
    values = (signal.centred if settings.rule == "centred" else signal.values).tolist()
    kept = []
    valued = [place for place in range(len(rows)) if np.isfinite(values[place])]
    for prompt_id in dict.fromkeys(rows[place]["prompt_id"] for place in valued):
        places = [place for place in valued if rows[place]["prompt_id"] == prompt_id]
        found = [
            (values[worse] - values[better], rows[better]["id"], rows[worse]["id"], better, worse)
            for better, worse in permutations(places, 2)
            if values[better] - values[worse] > 0
            and values[better] - values[worse] >= settings.margin
            and (settings.rule == "difference" or values[better] > 0 > values[worse])
            and rows[better]["completion"] != rows[worse]["completion"]
        ]
        texts = {}
        for pair in sorted(found, key=lambda pair: pair[:3]):
            texts.setdefault(frozenset(rows[place]["completion"] for place in pair[3:]), pair)
        kept += [*texts.values()][: settings.per_prompt]
    top = sorted(range(len(kept)), key=lambda i: (kept[i][0], i))[: settings.top_k]
    return [(values[better], values[worse], *ids) for _, *ids, better, worse in (kept[i] for i in sorted(top))]


@pytest.mark.parametrize("rule", ["sign", "centred", "difference"])
@pytest.mark.parametrize("cut", [{}, {"per_prompt": 3}, {"top_k": 5}, {"per_prompt": 2, "top_k": 4}, {"top_k": 1000}])
def test_pairs_are_those_of_the_plain_rule(rule, cut):
    draw = random.Random(f"{rule}{cut}")
    for margin in (0.0, 0.3):
        for _ in range(20):
            rows = make_generated(3, siblings=8)
            draw.shuffle(rows)
            for row in rows:
                row["completion"] = draw.choice("ABCDEFGHIJ")
                # Of other prompts' rows too: what decides then is the order of the input.
                row["id"] = draw.choice([row["id"], "twice"])
            # Tenths, whose differences round, and some of which are equal.
            values = [draw.choice([np.nan, *(number / 10 for number in range(-5, 6))]) for _ in rows]
            signal, settings = make_signal(values, drift=0.1), PairSettings(rule=rule, margin=margin, **cut)
            found = pairs.make_pairs(settings, rows, signal)
            plain = plain_pairs(settings, rows, signal)
            keys = ("chosen_value", "rejected_value", "chosen_id", "rejected_id")
            assert [tuple(pair[key] for key in keys) for pair in found] == plain


@pytest.mark.parametrize("cut", [{"per_prompt": 2}, {"top_k": 2}])
def test_memory_grows_with_the_pairs_that_stay_not_with_all(cut):
    rows, signal = make_generated(1, siblings=400), make_signal([*range(1, 201), *range(-200, 0)])
    for row in rows:
        row["completion"] = row["id"]
    tracemalloc.start()
    found = pairs.make_pairs(PairSettings(**cut), rows, signal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Of 200 · 200 pairs, a float of each would be 24 bytes.
    assert len(found) == 2 and peak < 24 * 200 * 200
