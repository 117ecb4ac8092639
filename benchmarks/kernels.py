"""The fused linear kernel per layer shape: time, GFLOP/s, share of the machine's matrix-product rate, ratio to dW.

    python -m benchmarks.kernels

Floating-point operations: 2 · T · O · I of the product dYᵀX for T tokens in all; the update and the dot product with
q are extra work that this count leaves out. Bytes that must move: 12 · O · I for m, v, q, once per batch, and the
operands 4 · T · (O + I). Plain dW is one product over all tokens; the kernel scores each example apart.
"""

from __future__ import annotations

import statistics

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import has_amx, interleaved, parser, write_result
from montessori import AdamWStep, ops
from montessori.products import product
from montessori.runs import DTYPES

SHAPES = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "TinyLlama-1.1B": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)],
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
TOKENS = 2048
STEP = AdamWStep(lr=5e-6, step=20)


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large square matrix product by the faster library, the best of four."""
    a, b = (torch.randn(3072, 3072).to(dtype) for _ in range(2))
    times = interleaved({"torch": lambda: a @ b, "ours": lambda: product(a, b)}, 2)
    return 2 * 3072**3 / min(min(values) for values in times.values()) / 1e9


def measure(out: int, num_in: int, length: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(TOKENS, width, generator=generator).to(dtype) for width in (num_in, out))
    q, exp_avg, param = (torch.randn(out, num_in, generator=generator) for _ in range(3))
    exp_avg_sq = exp_avg.square() + 0.1
    offsets = torch.arange(0, TOKENS + 1, length)
    arms = {
        "ours": lambda: ops.linear_influence(x, dy, offsets, q[None], exp_avg, exp_avg_sq, param, STEP, impl="cpu"),
        "dw": lambda: dy.T @ x,
    }
    times = interleaved(arms, repeats)
    ours = statistics.median(times["ours"])
    pairs = [a / b for a, b in zip(times["ours"], times["dw"], strict=True)]
    return {
        "seconds": ours,
        "gflops": 2 * TOKENS * out * num_in / ours / 1e9,
        "ratio_to_dw": statistics.median(pairs),
        "ratio_low": min(pairs),
        "ratio_high": max(pairs),
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of x and dy")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 512])
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    rate, rows = 0.0, []
    for model, shapes in SHAPES.items():
        for out, num_in in shapes:
            # Again before every shape: a shared machine is slower at times, and its rate is the best it has shown.
            rate = max(rate, product_rate(dtype))
            for length in arguments.lengths:
                found = measure(out, num_in, length, dtype, arguments.repeats)
                rows.append({"model": model, "out": out, "in": num_in, "length": length, **found})
    table = Table(title=f"{TOKENS} tokens, {arguments.dtype}, product rate {rate:.0f} GFLOP/s")
    for column in ("model", "O × I", "tokens an example", "ms", "GFLOP/s", "share of rate", "time / plain dW"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["model"], f"{row['out']} × {row['in']}", str(row["length"]), f"{row['seconds'] * 1e3:.1f}",
            f"{row['gflops']:.0f}", f"{row['gflops'] / rate:.0%}", f"{row['ratio_to_dw']:.2f}",
        )  # fmt: skip
    kind = f"{arguments.dtype}_{arguments.threads}t" + ("_amx" if has_amx() else "")
    path = write_result(f"kernels_{kind}", arguments, {"product_gflops": rate, "rows": rows})
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
