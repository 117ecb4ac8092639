"""The products of linear layers by `montessori.products` against torch's own choice of library, per layer shape.

python -m benchmarks.products

Forward is x Wᵀ, backward dX = dY W, weights dW = dYᵀ x, all float32 at the highest precision.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.common import interleaved, parser, ratios, write_result
from montessori.products import product

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (8192, 576)]
TOKENS = 2048


def measure(out: int, num_in: int, repeats: int) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(TOKENS, width, generator=generator) for width in (num_in, out))
    weight = torch.randn(out, num_in, generator=generator)
    operations = 2 * TOKENS * out * num_in
    found = {}
    factors = (("forward", x, weight), ("backward", dy, weight.t()), ("weights", dy.t(), x.t()))
    for name, left, right in factors:

        def torchs(left: torch.Tensor = left, right: torch.Tensor = right) -> torch.Tensor:
            return F.linear(left, right)

        def ours(left: torch.Tensor = left, right: torch.Tensor = right) -> torch.Tensor:
            return product(left, right)

        times = interleaved({"torch": torchs, "ours": ours}, repeats)
        rates = {arm: operations / statistics.median(values) / 1e9 for arm, values in times.items()}
        found[name] = {"gflops": rates, "speed": ratios(times, "ours", "torch")}
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=25)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"{TOKENS} tokens, {arguments.threads} threads")
    for column in ("O × I", "product", "torch, GFLOP/s", "ours, GFLOP/s", "speed"):
        table.add_column(column)
    rows = []
    for out, num_in in SHAPES:
        for name, found in measure(out, num_in, arguments.repeats).items():
            rows.append({"out": out, "in": num_in, "product": name, **found})
            rates = (f"{found['gflops'][arm]:.0f}" for arm in ("torch", "ours"))
            table.add_row(f"{out} × {num_in}", name, *rates, f"{found['speed']['median']:.2f}")
    path = write_result(f"products_{arguments.threads}t", arguments, {"rows": rows})
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
