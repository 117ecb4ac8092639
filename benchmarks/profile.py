"""Where the time of `score` goes, by kind of work, on SmolLM2-135M.

python -m benchmarks.profile --candidates seed_tasks_175.jsonl --reference reference_256.jsonl --threads 1
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import MAX_LENGTH, load_data, parser, spread_batches, warm_student, write_result
from montessori import InfluenceEstimator
from montessori.models import load_model

KINDS = {
    "matrix products: forward and dX": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::"),
    "scores of weights: dW, update, dot with q": ("montessori::linear_scores",),
    "attention": ("aten::_scaled_dot_product",),
    "cross-entropy of the head": ("montessori::cross_entropy_",),
    "scores of ready gradients": ("montessori::dense_scores",),
    "norms, for clipping": ("montessori::example_squares",),
    "gathers: padding out, labelled rows, embedding": ("aten::index", "aten::cat", "aten::embedding", "aten::gather"),
}
OTHER = "element by element: norms, activations, rotary, the rest"


def kind_of(name: str) -> str:
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), OTHER)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batches", type=int, default=1, help="how many batches are scored, spread over the lengths")
    options.add_argument("--batch-tokens", type=int, default=4096)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    everything, _, reference = load_data(arguments)
    checkpoint = warm_student(everything, arguments)
    model, tokenizer = load_model(checkpoint)
    candidates, _ = spread_batches(everything, tokenizer, arguments)
    estimator = InfluenceEstimator(
        model, checkpoint, reference, tokenizer=tokenizer, max_length=MAX_LENGTH, truncation="right"
    )
    estimator.score(candidates, batch_tokens=arguments.batch_tokens)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        estimator.score(candidates, batch_tokens=arguments.batch_tokens)
        wall = time.perf_counter() - start
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    spent["Python, between operators"] = max(0.0, wall - sum(spent.values()))
    rows = {kind: {"seconds": seconds, "share": seconds / wall} for kind, seconds in spent.most_common()}
    path = write_result("profile", arguments, {"wall_seconds": wall, "rows": rows})
    table = Table(title=f"{wall:.1f} s")
    for column in ("", "s", "share"):
        table.add_column(column)
    for kind, row in rows.items():
        table.add_row(kind, f"{row['seconds']:.2f}", f"{row['share']:.1%}")
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
