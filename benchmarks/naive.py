"""Two naive loops against scoring: measured at small N and R, and a model of the cost beside the measurements.

    python -m benchmarks.naive --candidates seed_tasks_175.jsonl --reference reference_256.jsonl

`optimised`: weights and optimizer state restored from memory, references unpadded and in batches. `published`:
checkpoint read again for every candidate, every sequence padded to 1,024 tokens. Each measured point is fitted by the
terms of its own cost; figures beyond the measured points are of that model, and marked so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
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


# What is timed on its own, and its seconds as a sum of terms with coefficients >= 0.
PHASES: dict[str, dict[str, Callable[[Size], list[float]]]] = {
    "optimised": {
        "references": lambda s: [0, s.reference_tokens],
        # A step and the way back per candidate; the references before the first and after every one.
        "loop": lambda s: [s.n, (s.n + 1) * s.reference_tokens],
    },
    # Reading the checkpoint and a step per candidate; the padded references before the first and after every one.
    "published": {"loop": lambda s: [s.n, (s.n + 1) * s.r]},
    "montessori": {
        # The proof and 8 pilot steps; the reference's losses and gradient.
        "prepare": lambda s: [1, s.reference_tokens, 0],
        "score": lambda s: [0, 0, s.candidate_tokens],
    },
}
# Phase, N and R of each measurement.
MEASURED = {
    "optimised": (("references", 2, 6), ("loop", 2, 6), ("references", 2, 6), ("loop", 2, 6), ("loop", 4, 6)),
    "published": (("loop", 1, 1), ("loop", 1, 2), ("loop", 2, 2)),
    "montessori": (("prepare", 16, 2), ("score", 16, 2), ("prepare", 16, 8), ("score", 16, 8)),
}
# The first run of a loop meets cold memory: measured, but not fitted. The others start from a model that has run.
COLD = {"optimised": 2, "published": 0, "montessori": 0}
MODELLED = [(n, r) for n in (8, 100, 1000) for r in (8, 64, 256)]


def whole(method: str, size: Size) -> list[float]:
    """Terms of a whole run: of its loop, or of its phases together."""
    phases = PHASES[method]
    parts = [phases["loop"]] if "loop" in phases else list(phases.values())
    return np.sum([terms(size) for terms in parts], axis=0).tolist()


def fit(
    method: str, phases: Sequence[str], sizes: Sequence[Size], seconds: Sequence[float]
) -> tuple[list[float], float]:
    """Coefficients of the method's terms, by least squares of relative errors, and the largest relative error."""
    rows = np.array([PHASES[method][phase](size) for phase, size in zip(phases, sizes, strict=True)], dtype=float)
    measured = np.array(seconds)
    coefficients, _ = nnls(rows / measured[:, None], np.ones_like(measured))
    return coefficients.tolist(), float(np.abs(rows @ coefficients / measured - 1).max())


def extrapolate(measured: Sequence[dict[str, Any]], sizes: Sequence[Size]) -> dict[str, Any]:
    """Coefficients and error of each method's fit to the points that are not cold, and its seconds at `sizes`."""
    result: dict[str, Any] = {"coefficients": {}, "fit_error": {}}
    for method in PHASES:
        warm = [row for row in measured if row["method"] == method and not row["cold"]]
        points = [Size(*(row[field.name] for field in fields(Size))) for row in warm]
        fitted = fit(method, [row["phase"] for row in warm], points, [row["seconds"] for row in warm])
        result["coefficients"][method], result["fit_error"][method] = fitted
    costs = [
        {method: float(np.dot(whole(method, size), found)) for method, found in result["coefficients"].items()}
        for size in sizes
    ]
    return result | {"modelled": [{**asdict(size), **cost} for size, cost in zip(sizes, costs, strict=True)]}


class Runner:
    """Runs phases of the methods on one student, warm."""

    def __init__(self, checkpoint: Path, candidates: list[Example], references: list[Example]) -> None:
        self.checkpoint, self.candidates, self.references = checkpoint, candidates, references
        self.model = load_student(checkpoint)
        self.state = read_state(checkpoint, self.model)
        response_loss(self.model, collate(candidates[:1])).sum().backward()
        self.model.zero_grad()

    def seconds(self, method: str, phase: str, n: int, r: int) -> float:
        """Time of a phase; `score` goes on from the `prepare` before it."""
        candidates, references = self.candidates[:n], self.references[:r]
        if phase == "prepare":
            self.estimator = InfluenceEstimator(self.model, self.state, list(map(_row, references)))
        start = time.perf_counter()
        if method == "published":
            published_naive_loop(self.checkpoint, candidates, references, max_length=MAX_LENGTH)
        elif phase == "prepare":
            self.estimator.prepare(list(map(_row, candidates)))
        elif phase == "score":
            self.estimator.score(list(map(_row, candidates)))
        else:
            sets = ReferenceSets({"reference": references}, "example_mean", 4096)
            if phase == "references":
                sets.loss(self.model, response_loss)
            else:
                optimised_naive_loop(self.model, self.state, candidates, sets)
        return time.perf_counter() - start


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
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    candidates, references, rest = examples_of(arguments)
    checkpoint = student_checkpoint(arguments, rest)
    runner = Runner(checkpoint, candidates, references)
    measured = []
    for method, points in MEASURED.items():
        for number, (phase, n, r) in enumerate(points):
            seconds, cold = runner.seconds(method, phase, n, r), number < COLD[method]
            size = size_of(n, r, candidates, references)
            measured.append({"method": method, "phase": phase, "seconds": seconds, "cold": cold, **asdict(size)})
            print(f"{method}, {phase}, {n} × {r}: {seconds:.1f} s", flush=True)
    sizes = [size_of(n, r, candidates, references) for n, r in MODELLED]
    tokens = {"candidates": [e.num_tokens for e in candidates], "references": [e.num_tokens for e in references]}
    result = {"measured": measured, "tokens": tokens, **extrapolate(measured, sizes)}
    path = write_result(f"naive_{arguments.model}", arguments, result)
    show(result)
    print(f"wrote {path}")


def show(result: dict[str, Any]) -> None:
    table = Table(title="seconds, modelled from the measured points")
    for column in ("N", "R", "optimised", "published", "montessori", "optimised / montessori"):
        table.add_column(column)
    for row in result["modelled"]:
        seconds = [row[method] for method in PHASES]
        table.add_row(str(row["n"]), str(row["r"]), *(f"{s:.0f}" for s in seconds), f"{seconds[0] / seconds[2]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
