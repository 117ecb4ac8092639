"""Histograms of values that hardly differ."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from montessori.inspection import bin_edges, print_histogram
from montessori.loop.figures import influence_figure


@pytest.mark.parametrize(
    "values", [[5e-3], [0.0, 0.0], [-2.0] * 3, [1e-5, 1e-5 * (1 + 4e-16)], [1e300, 1e300], [5e-324, 0.0]]
)
def test_values_that_are_the_same_are_drawn_among_others_of_their_size(values):
    values = np.array(values)
    edges = bin_edges(values, 10)
    assert len(edges) == 11 and (np.diff(edges) > 0).all()
    assert edges[0] <= values.min() and values.max() <= edges[-1]
    counts, _ = np.histogram(values, bins=edges)
    assert counts.sum() == len(values)
    console = Console(record=True, width=100)
    print_histogram(console, values, "influence")
    assert f"{len(values):5d} █" in console.export_text()
    influence_figure(values, None, {"tuned": list(values), "untuned": list(values)})


def test_others_are_drawn_from_the_lowest_to_the_highest():
    np.testing.assert_allclose(bin_edges(np.array([1.0, 3.0, 2.0]), 4), [1, 1.5, 2, 2.5, 3])
