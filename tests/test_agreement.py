"""Measures of agreement where a value is 0, or all are the same."""

from __future__ import annotations

import math

import numpy as np
import pytest

from montessori.agreement import Agreement
from montessori.errors import ArgumentError


def test_a_zero_that_was_foreseen_is_no_error():
    found = Agreement.of(np.array([1.0, 2.0, 3.0, 0.0]), np.array([1.0, 2.0, 4.0, 0.0]))
    assert (found.median_relative_error, found.max_relative_error) == (0, 0.25)
    assert found.sign_agreement == 1
    # One that was not is as far off as can be.
    assert Agreement.of(np.array([1.0, 1e-9]), np.array([1.0, 0.0])).max_relative_error == math.inf


def test_constants_have_no_correlation():
    found = Agreement.of(np.ones(3), np.arange(3.0))
    assert math.isnan(found.pearson) and math.isnan(found.spearman)


def test_two_values_at_least_are_compared():
    with pytest.raises(ArgumentError, match="two arrays of one length"):
        Agreement.of(np.ones(1), np.ones(1))
