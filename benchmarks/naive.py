"""Two naive loops against scoring: measured at small N and R, and a model of the cost beside the measurements.

    python -m benchmarks.naive --candidates seed_tasks_175.jsonl --reference reference_256.jsonl

`optimised`: weights and optimizer state restored from memory, references unpadded and in batches. `published`:
checkpoint read again for every candidate, every sequence padded to 1,024 tokens. Each measured point is fitted by the
terms of its own cost; figures beyond the measured points are of that model, and marked so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from benchmarks.common import MAX_LENGTH, parser, write_result
from benchmarks.students import SCORED_ROWS, add_model_options, examples_of, load_student, student_checkpoint
from montessori import InfluenceEstimator
from montessori.batching import Example, collate
from montessori.checkpoints import read_state
from montessori.losses import response_loss
from montessori.naive import optimised_naive_loop, published_naive_loop
from montessori.referenceset import ReferenceSets


@dataclass(frozen=True)
class Size:
    """N candidates and R references, and the tokens of each."""

    n: int
    r: int
    candidate_tokens: float
    reference_tokens: float


# Seconds as a sum of these terms, with coefficients >= 0.
TERMS: dict[str, Callable[[Size], list[float]]] = {
    # A step per candidate; the references before the first step and after every one.
    "optimised": lambda s: [s.n, (s.n + 1) * s.reference_tokens],
    # Reading the checkpoint and a step per candidate; its references before and after, padded.
    "published": lambda s: [s.n, s.n * s.r],
    # Proof and pilot steps once; the reference gradient; a pass over the candidates.
    "montessori": lambda s: [1, s.reference_tokens, s.candidate_tokens],
}
MEASURED = {
    "optimised": ((2, 2), (2, 6), (4, 6)),
    "published": ((1, 1), (1, 2), (2, 2)),
    "montessori": ((4, 2), (4, 6), (12, 6)),
}
MODELLED = [(n, r) for n in (8, 100, 1000) for r in (8, 64, 256)]


def fit(method: str, sizes: list[Size], seconds: list[float]) -> tuple[list[float], float]:
    """Coefficients of the method's terms, by least squares of relative errors, and the largest relative error."""
    rows, measured = np.array([TERMS[method](size) for size in sizes], dtype=float), np.array(seconds)
    coefficients, _ = nnls(rows / measured[:, None], np.ones_like(measured))
    return coefficients.tolist(), float(np.abs(rows @ coefficients / measured - 1).max())


def measure(method: str, checkpoint: Path, candidates: list[Example], references: list[Example]) -> list[float]:
    """Seconds of whole runs at the method's points."""
    model = load_student(checkpoint)
    # Warm: threads, buffers and the files that a reload reads.
    response_loss(model, collate(candidates[:1])).sum().backward()
    model.zero_grad()
    state = read_state(checkpoint, model)

    def run(n: int, r: int) -> None:
        if method == "published":
            published_naive_loop(checkpoint, candidates[:n], references[:r], max_length=MAX_LENGTH)
        elif method == "optimised":
            sets = ReferenceSets({"reference": references[:r]}, "example_mean", 4096)
            optimised_naive_loop(model, state, candidates[:n], sets)
        else:
            rows = [[_row(example) for example in examples] for examples in (references[:r], candidates[:n])]
            InfluenceEstimator(model, state, rows[0]).score(rows[1])

    seconds = []
    for n, r in MEASURED[method]:
        start = time.perf_counter()
        run(n, r)
        seconds.append(time.perf_counter() - start)
    return seconds


def size_of(n: int, r: int, candidates: list[Example], references: list[Example]) -> Size:
    """Size of the first `n` and `r` examples, or of as many of mean length where there are fewer."""

    def tokens(examples: list[Example], count: int) -> float:
        lengths = [example.num_tokens for example in examples]
        return float(sum(lengths[:count]) if count <= len(lengths) else count * np.mean(lengths))

    return Size(n, r, tokens(candidates, n), tokens(references, r))


def _row(example: Example) -> dict[str, list[int]]:
    return {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_model_options(options, scored=SCORED_ROWS, references=256)
    options.set_defaults(max_length=256)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    candidates, references, rest = examples_of(arguments)
    checkpoint = student_checkpoint(arguments, rest)
    result: dict[str, Any] = {"measured": [], "coefficients": {}, "fit_error": {}, "modelled": []}
    for method in TERMS:
        sizes = [size_of(n, r, candidates, references) for n, r in MEASURED[method]]
        seconds = measure(method, checkpoint, candidates, references)
        result["coefficients"][method], result["fit_error"][method] = fit(method, sizes, seconds)
        result["measured"] += [
            {"method": method, "seconds": s, **asdict(size)} for size, s in zip(sizes, seconds, strict=True)
        ]
        print(f"{method}: {seconds}", flush=True)
    for n, r in MODELLED:
        size = size_of(n, r, candidates, references)
        costs = {method: float(np.dot(TERMS[method](size), result["coefficients"][method])) for method in TERMS}
        result["modelled"].append({**asdict(size), **costs})
    path = write_result(f"naive_{arguments.model}", arguments, result)
    show(result)
    print(f"wrote {path}")


def show(result: dict[str, Any]) -> None:
    table = Table(title="seconds, modelled from the measured points")
    for column in ("N", "R", "optimised", "published", "montessori", "optimised / montessori"):
        table.add_column(column)
    for row in result["modelled"]:
        seconds = [row[method] for method in TERMS]
        table.add_row(str(row["n"]), str(row["r"]), *(f"{s:.0f}" for s in seconds), f"{seconds[0] / seconds[2]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
