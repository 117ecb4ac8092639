from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from montessori.errors import ArgumentError
from montessori.loop.statistics import bootstrap_mean, compare_means, tail_probability
from montessori.loop.winrate import win_rate


def test_the_interval_agrees_with_the_normal_one_on_a_large_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    found = bootstrap_mean(values, seed=1)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(len(values)))
    # The quantiles of 10,000 resamples have a standard error of about 2 % of the half-width.
    assert found.low == pytest.approx(low, abs=0.08 * (high - low))
    assert found.high == pytest.approx(high, abs=0.08 * (high - low))
    assert found.mean == pytest.approx(values.mean()) and found.n == 4000


def test_intervals_and_p_values_repeat_with_their_seed_and_ignore_the_block_size(monkeypatch):
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, 30), rng.normal(0, 1, 20)
    assert compare_means(a, b, seed=5, resamples=500) == compare_means(a, b, seed=5, resamples=500)
    whole = bootstrap_mean(a, seed=5)
    monkeypatch.setattr("montessori.loop.statistics._BLOCK", 900)
    assert bootstrap_mean(a, seed=5) == whole


def test_the_p_value_is_that_of_the_exact_permutation_test():
    a, b = np.array([2.1, 1.9, 2.4, 2.0, 1.7]), np.array([1.0, 1.8, 1.2, 1.5])
    exact = stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), alternative="greater").pvalue
    found = compare_means(a, b, resamples=20_000)
    # Four standard errors of a share estimated from 20,000 draws.
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))
    assert compare_means(b, a, resamples=2000).p > 0.9
    assert found.difference.mean == pytest.approx(a.mean() - b.mean())


@pytest.mark.parametrize(("n", "percentile"), [(4, 0.79), (8, 0.89), (16, 0.92)])
def test_intervals_of_few_values_hold_the_mean_nearly_as_often_as_they_say(n, percentile):
    """`percentile`: coverage of plain percentiles. No mean of a resample lies outside its values, so not quite 0.95."""
    rng = np.random.default_rng(n)
    samples = rng.normal(0, 1, (800, n))
    found = [bootstrap_mean(sample, seed=i, resamples=2000) for i, sample in enumerate(samples)]
    coverage = np.mean([interval.low <= 0 <= interval.high for interval in found])
    error = np.sqrt(percentile * (1 - percentile) / 800)
    assert percentile + error < coverage < 0.95 + 3 * error


def test_the_tail_is_that_of_students_t():
    """Two samples alike have twice the degrees of freedom of one; constant ones tell nothing of the spread."""
    values = np.array([1.0, 2.0, 4.0, 7.0])
    for samples, freedom in (([values], 3), ([values, values + 5], 6), ([values, np.ones(3)], 3), ([values, [1.0]], 3)):
        t = stats.t.isf(0.025, freedom)
        expected = stats.norm.cdf(-np.sqrt(4 / 3) * t)
        assert tail_probability([np.asarray(sample) for sample in samples]) == pytest.approx(expected)
    assert bootstrap_mean(np.array([3.0])).low == 3.0 == bootstrap_mean(np.full(5, 3.0)).high


def test_equal_samples_do_not_differ():
    assert compare_means(np.ones(5), np.ones(5), resamples=100).p == 1.0


def test_equal_means_of_unequal_spread_seldom_differ():
    """Of a plain difference one sample in ten would, where one in twenty may."""
    rng = np.random.default_rng(0)
    samples = [(rng.normal(0, 2, 16), rng.normal(0, 1, 64)) for _ in range(400)]
    found = [compare_means(a, b, seed=seed, resamples=100).p for seed, (a, b) in enumerate(samples)]
    # Two standard errors of such a share.
    assert abs(np.mean(np.array(found) <= 0.05) - 0.05) <= 2 * (0.05 * 0.95 / 400) ** 0.5


def test_one_value_is_compared_by_its_difference():
    assert compare_means(np.array([9.0]), np.arange(9.0), resamples=2000).p == pytest.approx(0.1, abs=0.02)


def test_empty_and_broken_values_are_refused():
    for values in ([], [1.0, np.nan]):
        with pytest.raises(ArgumentError, match="at least one value and all of them finite"):
            bootstrap_mean(np.array(values))


def test_both_orders_cancel_a_judge_that_likes_the_first_answer():
    found = win_rate([1.0] * 6, [0.0] * 6, [10] * 6, [10] * 6)
    assert found.win_rate.mean == 0.5 and found.first_position == 1.0 and found.length_controlled == 0.5


def test_wins_count_and_ties_count_half():
    found = win_rate([1, 1, 0.5, 0], [1, 1, 0.5, 0], [5, 6, 7, 8], [5, 6, 7, 8])
    assert found.win_rate.mean == pytest.approx(0.625)
    assert found.first_position == 0.5


def test_a_judge_that_goes_by_length_alone_gives_no_length_controlled_win():
    rng = np.random.default_rng(0)
    difference = rng.normal(100, 60, 400).round()
    ours = 500 + difference
    verdict = 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))
    found = win_rate(verdict, verdict, ours, np.full(400, 500.0))
    assert found.win_rate.mean > 0.75
    assert found.length_controlled == pytest.approx(0.5, abs=0.02)


def test_unanimous_verdicts_are_won_at_any_length():
    found = win_rate([1.0] * 5, [1.0] * 5, [10, 20, 30, 40, 50], [10] * 5)
    assert found.length_controlled == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("wins", [1.0, 0.75, 0.0])
def test_of_equal_lengths_the_rate_is_the_one_at_equal_length(wins):
    verdict = [1.0] * round(4 * wins) + [0.0] * round(4 * (1 - wins))
    assert win_rate(verdict, verdict, [10] * 4, [10] * 4).length_controlled == wins
    # If all differ alike, nothing is known of equal ones.
    assert win_rate(verdict, verdict, [20] * 4, [10] * 4).length_controlled is None


def test_wrong_verdicts_are_refused():
    with pytest.raises(ArgumentError, match="same number"):
        win_rate([1.0], [1.0, 0.0], [1], [1])
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        win_rate([2.0], [1.0], [1], [1])
