"""Peak resident size of scoring against plain forward + backward, each in a process of its own.

    python -m benchmarks.memory --candidates seed_tasks_175.jsonl --reference reference_256.jsonl

The plain process also holds arrays of the size of m, v and q, which scoring cannot do without. The peak of the whole
process is the higher of those of preparation (reference gradient and anchor) and of scoring.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import MAX_LENGTH, load_data, parser, peak_bytes, reset_peak, warm_student, write_result
from benchmarks.speed import plain_pass
from montessori import InfluenceEstimator
from montessori.batching import make_batches
from montessori.encoding import encode_rows
from montessori.models import load_model

ARMS = ("plain", "score")


def run_arm(arguments, arm: str, batch_tokens: int) -> dict[str, int]:
    """Do the work of one arm here; peak resident sizes of this process in bytes."""
    everything, candidates, reference = load_data(arguments)
    checkpoint = warm_student(everything, arguments)
    model, tokenizer = load_model(checkpoint)
    settings = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "truncation": "right"}
    if arm == "score":
        estimator = InfluenceEstimator(model, checkpoint, reference, **settings)
        estimator.prepare(candidates)
        peaks = {"prepare": peak_bytes()}
        reset_peak()
        estimator.score(candidates, batch_tokens=batch_tokens)
        return peaks | {"score": peak_bytes()}
    held = [torch.ones_like(parameter) for parameter in model.parameters() for _ in range(3)]
    examples = encode_rows(candidates, tokenizer, max_length=MAX_LENGTH, truncation="right").examples
    reset_peak()
    plain_pass(model, make_batches(examples, batch_tokens))
    del held
    return {"plain": peak_bytes()}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch-tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    options.add_argument("--arm", choices=ARMS, help="run this one here and print its peak")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.arm:
        print(json.dumps(run_arm(arguments, arguments.arm, arguments.batch_tokens[0])))
        return
    warm_student(load_data(arguments)[0], arguments)
    peaks = {}
    for tokens in arguments.batch_tokens:
        for arm in ARMS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                *sys.argv[1:],
                "--arm",
                arm,
                "--batch-tokens",
                str(tokens),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for phase, peak in json.loads(done.stdout.splitlines()[-1]).items():
                peaks[f"{phase}/{tokens}"] = peak
    path = write_result("memory", arguments, {"peak_rss_bytes": peaks})
    table = Table(title="peak resident size, GB")
    columns = ("padded tokens of a batch", "plain, with m, v, q", "preparation", "score", "whole / plain")
    for column in columns:
        table.add_column(column)
    for tokens in arguments.batch_tokens:
        plain, prepare, score = (peaks[f"{phase}/{tokens}"] for phase in ("plain", "prepare", "score"))
        sizes = [f"{size / 1e9:.2f}" for size in (plain, prepare, score)]
        table.add_row(str(tokens), *sizes, f"{max(prepare, score) / plain:.2f}")
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
