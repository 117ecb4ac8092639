"""Norms of per-example gradients without the gradients, against those of the gradients themselves."""

from __future__ import annotations

import pytest
import torch

from montessori import norms
from montessori.norms import squared_norms
from montessori.ops import SparseRows
from montessori.uses import DenseUse, ExpertsUse, LinearUse, RowsUse, Stack, example_gradient

# An empty example in the midst, at the beginning, at the end; one alone.
LENGTHS = [(5, 0, 7, 1), (0, 3), (4, 0), (6,), (3, 3, 3)]
# As wide as the texts are short, and the other way round.
SHAPES = [(48, 40), (3, 2)]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def linear_use(lengths, shape, layout="packed", tied=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(lengths))
    offsets, longest, starts = offsets_of(lengths), max(lengths), None
    count = int(offsets[-1])
    if layout != "packed":
        # Padding behind every example, and rows before the first and between them that are nobody's.
        first, stride = (0, longest) if layout == "padded" else (2, longest + 1)
        starts = first + torch.arange(len(lengths)) * stride
        count = first + len(lengths) * stride
    x = torch.full((count, shape[1]), torch.nan, dtype=dtype)
    dy = torch.zeros(count, shape[0], dtype=dtype)
    for begin, length in zip(offsets[:-1] if starts is None else starts, lengths, strict=True):
        x[begin : begin + length] = torch.randn(length, shape[1], generator=generator).to(dtype)
        dy[begin : begin + length] = torch.randn(length, shape[0], generator=generator).to(dtype)
    return LinearUse(x, dy, offsets, table(lengths, shape, dtype) if tied else None, starts)


def table(lengths, shape, dtype=torch.float64):
    """Rows of which some come up twice."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length + 1 for length in lengths]
    ids = torch.randint(0, shape[0], (sum(lengths),), generator=generator)
    grad = torch.randn(sum(lengths), shape[1], generator=generator).to(dtype)
    return SparseRows(ids, grad, offsets_of(lengths))


def assert_norms(use, size, shape, rtol=1e-12):
    want = [example_gradient(use, example, torch.Size(shape)).double().square().sum() for example in range(size)]
    torch.testing.assert_close(squared_norms(use, size, torch.Size(shape)), torch.stack(want), rtol=rtol, atol=0)


@pytest.mark.parametrize("held", [1 << 24, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded", "apart"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_norms_are_those_of_the_gradients(lengths, shape, layout, tied, held, monkeypatch):
    """Padding is not looked at, not even where it is NaN."""
    monkeypatch.setattr(norms, "_HELD", held)
    assert_norms(linear_use(lengths, shape, layout, tied), len(lengths), shape)
    assert_norms(RowsUse(table(lengths, shape)), len(lengths), shape)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_narrow_factors(shape, dtype, rtol):
    # Sums of some 10^3 products in float32; two factors of each of some ten are rounded to 8 bits in bfloat16.
    assert_norms(linear_use((5, 0, 7, 1), shape, "padded", True, dtype), 4, shape, rtol)


def test_activations_of_float16_that_are_large_do_not_overflow():
    use = linear_use((5, 3), (48, 40), dtype=torch.float16)
    assert_norms(LinearUse(300 * use.x, use.dy, use.offsets), 2, (48, 40), rtol=1e-5)


def test_norms_of_ready_gradients_and_of_experts():
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (3, 5), (2, 3, 4)):
        assert_norms(DenseUse(torch.randn(3, *shape, generator=generator, dtype=torch.float64)), 3, shape)
    parts = {expert: linear_use(lengths, (6, 4)) for expert, lengths in ((0, (2, 0, 1)), (3, (0, 4, 1)))}
    for stack, shape in ((Stack(), (5, 6, 4)), (Stack("rows", 5), (30, 4)), (Stack("columns", 5), (6, 20))):
        assert_norms(ExpertsUse(parts, stack), 3, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_example_that_is_not_finite_keeps_that_to_itself(shape):
    use = linear_use((5, 4, 7), shape, "padded")
    use.dy[2] = torch.inf
    found = squared_norms(use, 3, torch.Size(shape))
    assert not found[0].isfinite() and found[1:].isfinite().all()
