"""Norms of per-example gradients without the gradients, against those of the gradients themselves."""

from __future__ import annotations

import pytest
import torch
from op_cases import simd_levels

from montessori import cpu, norms
from montessori.norms import squared_norms
from montessori.ops import SparseRows
from montessori.uses import DenseUse, ExpertsUse, LinearUse, RowsUse, Stack, example_gradient

compiled = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}")
EXAMPLE_SQUARES = cpu.example_squares
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
    torch.testing.assert_close(squared_norms(use, size), torch.stack(want), rtol=rtol, atol=0)


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
    for shape in ((), (7,), (3, 5), (2, 3, 4)):
        assert_norms(DenseUse(torch.randn(3, *shape, generator=generator, dtype=torch.float64)), 3, shape)
    parts = {expert: linear_use(lengths, (6, 4)) for expert, lengths in ((0, (2, 0, 1)), (3, (0, 4, 1)))}
    for stack, shape in ((Stack(), (5, 6, 4)), (Stack("rows", 5), (30, 4)), (Stack("columns", 5), (6, 20))):
        assert_norms(ExpertsUse(parts, stack), 3, shape)


@compiled
@pytest.mark.parametrize("simd", ["", *simd_levels()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(5, 0, 7, 1), (47, 97, 0, 48)])
@pytest.mark.parametrize("layout", ["packed", "apart"])
def test_the_kernels_norms_are_those_of_the_gradients(monkeypatch, simd, dtype, lengths, layout):
    """Widths beyond what goes at a time, and no multiple of any vector; every element of the factors as it stands."""
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    use, calls = linear_use(lengths, (703, 517), layout, dtype=dtype), []
    monkeypatch.setattr(cpu, "example_squares", lambda *given: calls.append(EXAMPLE_SQUARES(*given)) or calls[-1])
    wide = LinearUse(use.x.double(), use.dy.double(), use.offsets, starts=use.starts)
    want = squared_norms(wide, len(lengths), "reference")
    # The largest terms, of a token with itself, are sums of 703 squares in float32: sqrt(703) roundings of 2^-24.
    torch.testing.assert_close(squared_norms(use, len(lengths)), want, rtol=2e-6, atol=0)
    assert len(calls) == 1


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_the_batch_change_a_bit_of_the_kernels_norms(dtype):
    use, threads = linear_use((60, 1, 97), (80, 70), dtype=dtype), torch.get_num_threads()
    spans = [(0, 60), (60, 61), (61, 158)]
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpu.example_squares(use.x, use.dy, spans))
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([cpu.example_squares(use.x, use.dy, [span]) for span in spans])
    assert all(torch.equal(result, alone) for result in results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_example_that_is_not_finite_keeps_that_to_itself(shape, dtype):
    use = linear_use((5, 4, 7), shape, "padded", dtype=dtype)
    use.dy[2] = torch.inf
    found = squared_norms(use, 3)
    assert not found[0].isfinite() and found[1:].isfinite().all()


def test_rows_that_a_stride_divides_are_not_taken_for_padded_ones():
    # One row and then two: twice two rows would be padded.
    use = linear_use((1, 2), (48, 40))
    packed = squared_norms(use, 2, "reference")
    want = [example_gradient(use, example, torch.Size((48, 40))).square().sum() for example in range(2)]
    torch.testing.assert_close(packed, torch.stack(want))


def test_a_module_that_no_token_reached_has_norm_0():
    assert squared_norms(linear_use((0, 0), (3, 2)), 2, "reference").tolist() == [0, 0]
