"""The compiled CPU operators, called directly: what does not fit is refused before a kernel indexes by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from montessori import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}")

CONSTANTS = {"a1": 0.9, "a2": 0.1, "s1": 0.9, "s2": 0.1, "eps": 1e-8, "decay": 0.1, "on_param": 0.1, "on_exp_avg": 0.1}
SETS, OUT, IN, TOKENS, VOCABULARY = 2, 6, 4, 5, 7


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def state(*shape: int) -> dict[str, Tensor]:
    """In which nothing but a gradient moves the weight."""
    zeros = torch.zeros(shape)
    return {"q": torch.ones(SETS, *shape), "exp_avg": zeros, "exp_avg_sq": torch.ones(shape), "param": zeros.clone()}


def right(operator: str) -> dict:
    """Arguments that fit: three examples, of which the second is empty; the weight is small enough to be one tile."""
    if operator == "linear_scores":
        optional = ("positions", "row_ids", "row_grad", "row_offsets", "tiles", "bounds", "population")
        batch = {"x": torch.ones(TOKENS, IN), "dy": torch.ones(TOKENS, OUT), "offsets": numbers(0, 3, 3, 5)}
        return batch | state(OUT, IN) | dict.fromkeys(optional) | CONSTANTS | {"round_products": False}
    if operator == "tile_norms":
        return {"q": torch.ones(SETS, OUT, IN)}
    if operator == "example_squares":
        batch = {"x": torch.ones(TOKENS, IN), "dy": torch.ones(TOKENS, OUT), "offsets": numbers(0, 3, 3, 5)}
        return batch | {"positions": None}
    if operator == "dense_scores":
        return {"grad": torch.ones(3, OUT * IN)} | state(OUT * IN) | CONSTANTS
    if operator == "step_":
        moments = {name: tensor for name, tensor in state(OUT, IN).items() if name != "q"}
        return moments | {"source": torch.ones(OUT, IN), "grad": torch.ones(OUT, IN), "lr": 0.1} | CONSTANTS
    targets = numbers(0, 3, VOCABULARY - 1)
    return {"logits": torch.zeros(3, VOCABULARY), "targets": targets, "weights": torch.ones(3)}


def call(operator: str, **changes):
    return getattr(torch.ops.montessori, operator)(**right(operator) | changes)


ROWS = {"row_ids": numbers(0, 5, 2), "row_grad": torch.ones(3, IN), "row_offsets": numbers(0, 2, 2, 3)}
SAMPLE = {"tiles": numbers(0), "bounds": numbers(0, 1), "population": numbers(1)}
PLAIN = {"decay": 0.0, "on_param": 0.0, "on_exp_avg": 0.0}
SGD = PLAIN | {"exp_avg": None, "exp_avg_sq": None, "param": None}

WRONG = [
    ("linear_scores", {"q": torch.ones(OUT, IN)}, r"q: expected shape \[K, O, I\] = \[any, any, any\], got \[6, 4\]"),
    ("linear_scores", {"q": torch.ones(SETS, IN, OUT).mT}, "q: expected a contiguous CPU tensor"),
    ("linear_scores", {"q": torch.ones(SETS, OUT, IN).double()}, "q: expected float32, .*, got Double"),
    ("linear_scores", {"x": torch.ones(TOKENS, IN + 1)}, r"x: .*\[T, I\] = \[any, 4\], got \[5, 5\]"),
    ("linear_scores", {"x": torch.ones(TOKENS * IN)}, r"x: .*\[T, I\] = \[any, 4\], got \[20\]"),
    ("linear_scores", {"dy": torch.ones(TOKENS, OUT - 1)}, r"dy: .*\[T, O\] = \[5, 6\], got \[5, 5\]"),
    ("linear_scores", {"dy": torch.ones(TOKENS - 1, OUT)}, r"dy: .*\[T, O\] = \[5, 6\], got \[4, 6\]"),
    ("linear_scores", {"exp_avg": torch.ones(IN, OUT)}, r"exp_avg: .*\[O, I\] = \[6, 4\], got \[4, 6\]"),
    ("linear_scores", {"exp_avg_sq": torch.ones(OUT)}, r"exp_avg_sq: .*\[O, I\] = \[6, 4\], got \[6\]"),
    ("linear_scores", {"param": torch.ones(0, IN)}, r"param: .*\[O, I\] = \[6, 4\], got \[0, 4\]"),
    ("linear_scores", PLAIN | {"exp_avg": None}, "exp_avg: expected a tensor, as exp_avg_sq is given .*, got None"),
    ("linear_scores", SGD | {"on_exp_avg": 0.1}, "exp_avg: expected a tensor, .*on_exp_avg is not 0, got None"),
    ("linear_scores", SGD | {"decay": 0.1}, "param: expected a tensor, as decay or on_param is not 0, got None"),
    ("linear_scores", SGD | {"on_param": 0.1}, "param: expected a tensor, as decay or on_param is not 0, got None"),
    ("linear_scores", {"offsets": numbers()}, "offsets: expected a 0 and the end of each stretch, got no entry"),
    ("linear_scores", {"offsets": numbers(0, 3, 6)}, r"offsets: .* 0 to 5 \(the rows of x\), got 0 to 6"),
    ("linear_scores", {"offsets": numbers(-1, 5)}, r"offsets: .* 0 to 5 \(the rows of x\), got -1 to 5"),
    ("linear_scores", {"offsets": numbers(0, 9, 2, 5)}, "offsets: expected sorted bounds, got 9 then 2 at position 1"),
    ("linear_scores", {"offsets": numbers(0, 5).int()}, "offsets: expected a contiguous int64 CPU tensor"),
    ("linear_scores", {"offsets": numbers(0, 5)[:, None]}, r"offsets: .*\[B\+1\] = \[any\], got \[2, 1\]"),
    ("linear_scores", {"positions": numbers(0, 1, 2)}, r"offsets: .* 0 to 3 \(the positions given\), got 0 to 5"),
    ("linear_scores", {"positions": numbers(0, 1, 2, 3, 5)}, r"positions: .* below 5 \(the rows of x\), got 5 at .* 4"),
    ("linear_scores", {"positions": numbers(0, -1, 2, 3, 4)}, r"positions: .* below 5 .*, got -1 at position 1"),
    ("linear_scores", ROWS | {"row_grad": None}, "row_ids, row_grad, row_offsets: .* all three or none, got 2 of them"),
    ("linear_scores", ROWS | {"row_grad": torch.ones(2, IN)}, r"row_grad: .*\[R, I\] = \[3, 4\], got \[2, 4\]"),
    ("linear_scores", ROWS | {"row_ids": numbers(0, 6, 2)}, r"row_ids: .* below 6 \(the rows of the weight\), got 6"),
    ("linear_scores", ROWS | {"row_ids": numbers(5, 0, 2)}, "row_ids: .* sorted ids .* got 5 then 0 in example 0"),
    ("linear_scores", ROWS | {"row_offsets": numbers(0, 3)}, r"row_offsets: .*\[B\+1\] = \[4\], got \[2\]"),
    ("linear_scores", ROWS | {"row_offsets": numbers(0, 2, 2, 4)}, r"row_offsets: .* 0 to 3 \(the rows given\)"),
    ("linear_scores", SAMPLE | {"bounds": None}, "tiles, bounds, population: .* all three or none, got 2 of them"),
    ("linear_scores", SAMPLE | {"tiles": numbers(1)}, r"tiles: .* below 1 \(the tiles of this weight; draw them"),
    ("linear_scores", SAMPLE | {"tiles": numbers(-1)}, "tiles: expected numbers from 0 and below 1 .*, got -1"),
    ("linear_scores", SAMPLE | {"bounds": numbers(0, 2)}, r"bounds: .* 0 to 1 \(the tiles drawn\), got 0 to 2"),
    ("linear_scores", SAMPLE | {"bounds": numbers(0, 0, 1)}, r"bounds: .*\[H\+1\] = \[2\], got \[3\]"),
    ("linear_scores", SAMPLE | {"bounds": numbers(0, 1, 0, 1), "population": numbers(1, 0, 0)}, "bounds: .* 1 then 0"),
    ("linear_scores", SAMPLE | {"population": numbers(0)}, "population: .* at least the 1 tiles drawn from stratum 0"),
    ("linear_scores", SAMPLE | {"population": numbers(2)}, "population: expected a sum of 1, .*, got 2"),
    ("tile_norms", {"q": torch.ones(OUT, IN)}, r"q: .*\[K, O, I\] = \[any, any, any\], got \[6, 4\]"),
    ("example_squares", {"x": torch.ones(TOKENS)}, r"x: .*\[T, I\] = \[any, any\], got \[5\]"),
    ("example_squares", {"dy": torch.ones(TOKENS - 1, OUT)}, r"dy: .*\[T, O\] = \[5, 6\], got \[4, 6\]"),
    ("example_squares", {"dy": torch.ones(TOKENS, OUT).double()}, "dy: expected float32, .*, got Double"),
    ("example_squares", {"x": torch.ones(IN, TOKENS).mT}, "x: expected a contiguous CPU tensor"),
    ("example_squares", {"offsets": numbers(0, 6)}, r"offsets: .* 0 to 5 \(the rows of x\), got 0 to 6"),
    ("example_squares", {"positions": numbers(0, 1, 2, 3, 5)}, r"positions: .* below 5 \(the rows of x\), got 5"),
    ("dense_scores", {"q": torch.ones(SETS, OUT, IN)}, r"q: .*\[K, n\] = \[any, any\], got \[2, 6, 4\]"),
    ("dense_scores", {"grad": torch.ones(3, 23)}, r"grad: .*\[B, n\] = \[any, 24\], got \[3, 23\]"),
    ("dense_scores", {"grad": torch.ones(24)}, r"grad: .*\[B, n\] = \[any, 24\], got \[24\]"),
    ("dense_scores", {"exp_avg": torch.ones(23)}, "exp_avg: expected n = 24 elements, got 23"),
    ("dense_scores", {"exp_avg_sq": torch.ones(6, 5)}, "exp_avg_sq: expected n = 24 elements, got 30"),
    ("dense_scores", {"param": torch.ones(0)}, "param: expected n = 24 elements, got 0"),
    ("dense_scores", PLAIN | {"exp_avg": None}, "exp_avg: expected a tensor, as exp_avg_sq is given .*, got None"),
    ("dense_scores", SGD | {"grad": None, "decay": 0.1}, "param: expected a tensor, as decay .*, got None"),
    ("step_", {"param": torch.ones(7, IN)}, r"param: .*source.shape = \[6, 4\], got \[7, 4\]"),
    ("step_", {"source": torch.ones(5, IN)}, r"param: .*source.shape = \[5, 4\], got \[6, 4\]"),
    ("step_", {"source": torch.ones(OUT, IN).half()}, "param: expected Half, the dtype of source, got Float"),
    ("step_", {"grad": torch.ones(5, IN)}, r"grad: .*source.shape = \[6, 4\], got \[5, 4\]"),
    ("step_", {"exp_avg": torch.ones(IN)}, r"exp_avg: .*source.shape = \[6, 4\], got \[4\]"),
    ("step_", {"exp_avg_sq": torch.ones(IN)}, r"exp_avg_sq: .*source.shape = \[6, 4\], got \[4\]"),
    ("step_", PLAIN | {"exp_avg": None}, "exp_avg: expected a tensor, as exp_avg_sq is given .*, got None"),
    ("cross_entropy_", {"logits": torch.zeros(21)}, r"logits: .*\[n, V\] = \[any, any\], got \[21\]"),
    ("cross_entropy_", {"logits": torch.zeros(3, 7).half()}, "logits: expected a contiguous float32 CPU tensor"),
    ("cross_entropy_", {"targets": numbers(0, 1)}, r"targets: .*\[n\] = \[3\], got \[2\]"),
    ("cross_entropy_", {"targets": numbers(0, 7, 1)}, r"targets: .* below 7 \(the columns of logits\), got 7 at .* 1"),
    ("cross_entropy_", {"targets": numbers(0, 1, -100)}, "targets: .* below 7 .*, got -100 at position 2"),
    ("cross_entropy_", {"logits": torch.zeros(3, 0)}, "targets: .* below 0 .*, got 0 at position 0"),
    ("cross_entropy_", {"weights": torch.ones(2)}, r"weights: .*\[n\] = \[3\], got \[2\]"),
    ("cross_entropy_", {"weights": torch.ones(3).half()}, "weights: expected float32, got Half"),
]


@pytest.mark.parametrize(("operator", "change", "words"), WRONG)
def test_what_does_not_fit_is_a_one_line_error(operator, change, words):
    with pytest.raises(RuntimeError, match=words) as caught:
        call(operator, **change)
    assert "\n" not in str(caught.value)


def test_a_target_that_does_not_fit_leaves_the_logits_as_they_were():
    logits = torch.zeros(3, VOCABULARY)
    with pytest.raises(RuntimeError, match="targets"):
        call("cross_entropy_", logits=logits, targets=numbers(0, 1, VOCABULARY))
    assert torch.equal(logits, torch.zeros(3, VOCABULARY))


@pytest.mark.parametrize("sample", [{}, SAMPLE], ids=["all_tiles", "sampled"])
@pytest.mark.parametrize("step", [{}, SGD], ids=["adamw", "sgd"])
def test_an_empty_example_changes_nothing(sample, step):
    scores, variance = call("linear_scores", **sample, **step)
    assert scores.shape == variance.shape == (3, SETS)
    assert torch.equal(scores[1], torch.zeros(SETS, dtype=torch.float64))
    assert bool((scores[[0, 2]] > 0).all())


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("sample", [{}, SAMPLE], ids=["all_tiles", "sampled"])
@pytest.mark.parametrize("rows", [0, TOKENS])
def test_no_token_and_no_example_are_scored(size, sample, rows):
    """Without a row, or with rows of which none is any example's."""
    offsets, positions = numbers(*[0] * (size + 1)), numbers() if rows else None
    batch = {"x": torch.ones(rows, IN), "dy": torch.ones(rows, OUT), "offsets": offsets, "positions": positions}
    table = {"row_ids": numbers(), "row_grad": torch.ones(0, IN), "row_offsets": offsets}
    for tied in ({}, table):
        scores, _ = call("linear_scores", **batch, **sample, **tied)
        assert torch.equal(scores, torch.zeros(size, SETS, dtype=torch.float64))


def test_rows_are_found_where_positions_say():
    rows = torch.arange(8.0)[:, None]
    x, dy, taken = rows.expand(8, IN).contiguous(), (rows - 3).expand(8, OUT).contiguous(), numbers(7, 0, 3, 2, 5)
    packed = call("linear_scores", x=x[taken], dy=dy[taken], **ROWS)
    spread = call("linear_scores", x=x, dy=dy, positions=taken, **ROWS)
    assert torch.equal(spread[0], packed[0])
    assert not torch.equal(packed[0], call("linear_scores", x=x[taken], dy=dy[taken])[0])


def test_nothing_is_right_for_the_other_operators_too():
    none = torch.empty(0)
    assert call("dense_scores", grad=torch.ones(0, OUT * IN)).shape == (0, SETS)
    assert torch.equal(call("dense_scores", grad=None), torch.zeros(1, SETS, dtype=torch.float64))
    assert torch.equal(
        call("dense_scores", grad=torch.ones(3, 0), **state(0)), torch.zeros(3, SETS, dtype=torch.float64)
    )
    assert call("tile_norms", q=torch.ones(SETS, 0, IN)).shape == (SETS, 0)
    assert call("example_squares").tolist() == [9 * IN * OUT, 0, 4 * IN * OUT]
    assert call("example_squares", x=torch.ones(0, IN), dy=torch.ones(0, OUT), offsets=numbers(0)).shape == (0,)
    assert call("example_squares", x=torch.ones(TOKENS, 0)).tolist() == [0, 0, 0]
    assert call("cross_entropy_", logits=torch.ones(0, 7), targets=numbers(), weights=none).shape == (0,)
    call("step_", param=none, source=none, grad=none, exp_avg=none, exp_avg_sq=none)
