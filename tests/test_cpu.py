"""The compiled CPU kernels: every instruction set, every thread count, the same scores."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from op_cases import linear_case, simd_levels, with_padding

from montessori import AdamWStep, SGDStep, cpu, ops
from montessori.errors import ArgumentError, FallbackWarning
from montessori.ops import SparseRows

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}")

STEP = AdamWStep(lr=1e-3, eps=1e-6, step=5, weight_decay=0.1)


def problem(num_out=203, num_in=211, lengths=(37, 0, 1, 64), sets=2, tied=True, seed=0):
    """Shapes that are no multiple of any tile; returns positional arguments and `rows`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    shape = (num_out, num_in)
    x, dy = normal(int(offsets[-1]), num_in), normal(int(offsets[-1]), num_out)
    state = (normal(sets, *shape), normal(*shape), normal(*shape).square() + 0.1, normal(*shape))
    ids = torch.randint(0, num_out, (int(offsets[-1]),), generator=generator)
    rows = SparseRows(ids, normal(len(ids), num_in), offsets) if tied else None
    return (x, dy, offsets, *state), rows


def scores(arguments, rows, step=STEP, impl="cpu"):
    return ops.linear_influence(*arguments, step, rows=rows, impl=impl)


@pytest.mark.parametrize("simd", simd_levels())
@pytest.mark.parametrize("step", [STEP, SGDStep(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, step=3)])
@pytest.mark.parametrize("num_in", [1, 47, 211])
def test_every_instruction_set_is_at_least_as_exact_as_plain_torch(monkeypatch, simd, step, num_in):
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    arguments, rows = problem(num_in=num_in)
    wide = tuple(t.double() if t.is_floating_point() else t for t in arguments)
    want = scores(wide, SparseRows(rows.ids, rows.grad.double(), rows.offsets), step, "reference")
    plain, got = scores(arguments, rows, step, "reference"), scores(arguments, rows, step)
    # Twice the plain path's error, and a rounding of the sum of absolute values that either adds up.
    q = arguments[3]
    largest = 2 * step.lr * float(q.abs().sum()) * torch.finfo(torch.float32).eps
    assert torch.all((got - want).abs() <= 2 * (plain - want).abs() + largest)
    assert float(want.abs().max()) > 1e3 * largest


def in_dtype(arguments, dtype):
    """The same problem with x and dy in another dtype."""
    return (*(tensor.to(dtype) for tensor in arguments[:2]), *arguments[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    arguments, rows = problem(num_out=700, num_in=600)
    arguments = in_dtype(arguments, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(scores(arguments, rows))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("simd", simd_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_example_has_the_same_bits_alone_and_in_a_batch(monkeypatch, simd, dtype):
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    arguments, rows = problem()
    x, dy, offsets, *state = in_dtype(arguments, dtype)
    together = scores((x, dy, offsets, *state), rows)
    for b, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        one = torch.tensor([0, high - low])
        alone = scores(
            (x[low:high], dy[low:high], one, *state), SparseRows(rows.ids[low:high], rows.grad[low:high], one)
        )
        assert torch.equal(alone[0], together[b])


@pytest.fixture
def matmul_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("matmul_precision", ["highest", "medium"], indirect=True)
def test_nan_in_one_example_stays_there(matmul_precision):
    (x, *rest), rows = problem()
    clean = scores((x, *rest), rows)
    x = x.clone()
    x[0, 3] = torch.nan
    got = scores((x, *rest), rows)
    assert got[0].isnan().all()
    assert torch.equal(got[1:], clean[1:])


@pytest.mark.parametrize("simd", simd_levels())
@pytest.mark.parametrize("step", [STEP, SGDStep(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, step=3)])
@pytest.mark.parametrize(("dtype", "num_in"), [(torch.bfloat16, 1), (torch.bfloat16, 211), (torch.float16, 211)])
def test_narrow_inputs_are_computed_in_float32(monkeypatch, simd, step, dtype, num_in):
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    (x, dy, offsets, q, exp_avg, exp_avg_sq, param), rows = problem(num_in=num_in, lengths=(37, 0, 1, 130, 64))
    narrow = [tensor.to(dtype) for tensor in (x, dy, q, exp_avg, exp_avg_sq)]
    got = scores((*narrow[:2], offsets, *narrow[2:], param), rows, step)
    wide = [tensor.double() for tensor in narrow]
    wide_rows = SparseRows(rows.ids, rows.grad.double(), rows.offsets)
    want = scores((*wide[:2], offsets, *wide[2:], param.double()), wide_rows, step, "reference")
    plain = scores((*(t.float() for t in narrow[:2]), offsets, *narrow[2:], param), rows, step, "reference")
    largest = 2 * step.lr * float(q.abs().sum()) * torch.finfo(torch.float32).eps
    assert torch.all((got - want).abs() <= 2 * (plain - want).abs() + largest)
    assert float(want.abs().max()) > 1e3 * largest


def test_kernels_that_cut_a_weight_otherwise_have_another_tiling(monkeypatch):
    """A run that samples tiles and goes on elsewhere is told so by `tiling`."""
    cuts = {}
    for simd in simd_levels():
        monkeypatch.setenv("MONTESSORI_SIMD", simd)
        norms = [torch.ops.montessori.tile_norms(torch.zeros(1, rows, 200)) for rows in (576, 960, 1024, 1536)]
        cuts.setdefault(tuple(norm.shape[1] for norm in norms), set()).add(cpu.tiling())
    tilings = [tiling for found in cuts.values() for tiling in found]
    assert len(tilings) == len(set(tilings))


def test_other_libraries_find_their_matrix_registers_as_they_left_them():
    # oneDNN's products of bfloat16 use them too, on the same threads, and each shape sets them up in its own way.
    (x, dy, offsets, *state), rows = problem(num_out=700, num_in=600)
    x, dy = x.bfloat16(), dy.bfloat16()
    left, right = torch.randn(37, 50).bfloat16(), torch.randn(50, 70).bfloat16()
    product, score = left @ right, scores((x, dy, offsets, *state), rows)
    for _ in range(3):
        assert torch.equal(scores((x, dy, offsets, *state), rows), score)
        assert torch.equal(left @ right, product)


@pytest.mark.parametrize("simd", ["", *simd_levels()])
def test_medium_precision_rounds_products_where_torch_rounds_its_own(monkeypatch, simd):
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    (x, dy, offsets, *state), rows = problem()
    rounded = scores((x.bfloat16(), dy.bfloat16(), offsets, *state), rows)
    plain = scores((x, dy, offsets, *state), rows)
    assert not torch.equal(plain, rounded)
    monkeypatch.setattr(cpu, "torch_rounds_products", lambda: True)
    assert torch.equal(scores((x, dy, offsets, *state), rows), plain)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    in_pairs = (simd or simd_levels()[0]) in ("amx", "avx512bf16")
    assert torch.equal(scores((x, dy, offsets, *state), rows), rounded if in_pairs else plain)
    monkeypatch.setattr(cpu, "torch_rounds_products", lambda: False)
    assert torch.equal(scores((x, dy, offsets, *state), rows), plain)


def test_auto_says_what_it_chose_and_why():
    arguments, _ = problem(tied=False)
    tensors = (arguments[0], arguments[1], *arguments[3:])
    assert ops.choose_impl("auto", STEP, *tensors)[0] == "cpu"
    chosen, why = ops.choose_impl("auto", STEP, *(tensor.double() for tensor in tensors))
    assert chosen == "reference"
    assert "float64" in why


def test_the_operator_passes_opcheck():
    (x, dy, offsets, q, exp_avg, exp_avg_sq, param), rows = problem(num_out=5, num_in=3, lengths=(2, 1))
    order = torch.cat([rows.ids[:2].sort().indices, 2 + rows.ids[2:].sort().indices])
    table = (rows.ids[order], rows.grad[order], rows.offsets)
    operator = torch.ops.montessori.linear_scores.default
    constants = (0.9, 0.1, 0.9, 0.1, 1e-8, 0.0, 0.0, 0.0)
    torch.library.opcheck(
        operator, (x, dy, offsets, None, q, exp_avg, exp_avg_sq, param, *table, None, None, None, *constants, True)
    )


def test_the_other_operators_pass_opcheck():
    library, constants = torch.ops.montessori, (0.9, 0.1, 0.9, 0.1, 1e-8, 0.0, 0.0, 0.0)
    q, grad, exp_avg, param = torch.randn(2, 9), torch.randn(3, 9), torch.randn(9), torch.randn(9)
    offsets = torch.tensor([0, 2, 3])
    exp_avg_sq = exp_avg.square()
    torch.library.opcheck(library.dense_scores.default, (grad, q, exp_avg, exp_avg_sq, param, *constants))
    torch.library.opcheck(library.dense_scores.default, (None, q, exp_avg, exp_avg_sq, param, *constants))
    torch.library.opcheck(library.step_.default, (param, param.clone(), grad[0], exp_avg, exp_avg_sq, 0.1, *constants))
    torch.library.opcheck(library.tile_norms.default, (q.view(2, 3, 3),))
    torch.library.opcheck(library.example_squares.default, (torch.randn(3, 5), torch.randn(3, 4), offsets, None))
    torch.library.opcheck(library.cross_entropy_.default, (torch.randn(3, 5), torch.tensor([0, 4, 2]), torch.rand(3)))


def test_compiled_programs_may_score():
    (x, dy, offsets, *state), _ = problem(num_out=5, num_in=3, lengths=(2, 1))
    constants = (0.9, 0.1, 0.9, 0.1, 1e-8, 0.0, 0.0, 0.0)

    def operator(x, dy):
        scores, _ = torch.ops.montessori.linear_scores(x * 2, dy, offsets, None, *state, *[None] * 6, *constants, False)
        return scores.sum(0)

    def entry(x, dy):
        return ops.linear_influence(x * 2, dy, offsets, *state, STEP)

    whole = torch.compile(operator, backend="aot_eager", fullgraph=True)
    in_parts = torch.compile(entry, backend="aot_eager")
    assert torch.equal(whole(x, dy), operator(x, dy))
    assert torch.equal(in_parts(x, dy), entry(x, dy))


def test_the_package_works_where_the_kernels_are_not_built():
    code = (
        "from montessori import ops\n"
        "from montessori.errors import ArgumentError\n"
        "assert ops.available_impls() == ('reference',)\n"
        "try: ops.check_impl('cpu')\n"
        "except ArgumentError as error: print(error)\n"
    )
    environment = {"MONTESSORI_NO_KERNELS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert "MONTESSORI_NO_KERNELS is set" in done.stdout


def test_kernels_that_are_missing_are_missed_aloud(monkeypatch):
    tensors = [torch.ones(2, 2)] * 4
    monkeypatch.setattr(cpu, "load_error", lambda: "they were not built")
    with pytest.warns(FallbackWarning, match="plain torch scores .*: they were not built"):
        assert ops.choose_impl("auto", STEP, *tensors)[0] == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # In float64, the precision of checks, plain torch is what was asked for; and where kernels are switched off.
        assert ops.choose_impl("auto", STEP, torch.ones(2, dtype=torch.float64))[0] == "reference"
        monkeypatch.setenv("MONTESSORI_NO_KERNELS", "1")
        assert ops.choose_impl("auto", STEP, *tensors)[0] == "reference"


@pytest.mark.parametrize("simd", simd_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_padding_between_the_examples_changes_no_bit(monkeypatch, simd, dtype, impl):
    monkeypatch.setenv("MONTESSORI_SIMD", simd)
    case = linear_case((37, 0, 1, 64), num_out=203, num_in=211, tied=(40, 0, 3, 9)).to(torch.float32)
    case.x, case.dy = case.x.to(dtype), case.dy.to(dtype)
    assert torch.equal(with_padding(case).run(impl=impl), case.run(impl=impl))


@pytest.mark.parametrize(
    ("starts", "words"),
    [(torch.tensor([0, 3]), "example 1 within the 3 rows given, got rows 3 to 4"),
     (torch.tensor([-1, 2]), "example 0 within the 3 rows given, got rows -1 to 1"),
     (torch.tensor([0]), r"\[B\] = \[2\], got torch.int64 \[1\]"), (torch.tensor([0.0, 2]), "int64"), ([0, 2], "list")],
)  # fmt: skip
def test_starts_that_do_not_fit_are_one_line_errors(starts, words):
    (x, dy, offsets, *state), _ = problem(num_out=5, num_in=3, lengths=(2, 1))
    with pytest.raises(ArgumentError, match=words):
        ops.linear_influence(x, dy, offsets, *state, STEP, starts=starts)
