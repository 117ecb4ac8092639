"""How well a share of each weight's tiles stands for all of them, on SmolLM2-135M.

python -m benchmarks.sampling --candidates seed_tasks_175.jsonl --reference reference_256.jsonl
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import pearsonr, spearmanr

from benchmarks.common import MAX_LENGTH, load_data, parser, warm_student, write_result
from montessori import InfluenceEstimator
from montessori.models import load_model

SAMPLES = (0.1, 0.25, 0.5)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    everything, candidates, reference = load_data(arguments)
    checkpoint = warm_student(everything, arguments)
    model, tokenizer = load_model(checkpoint)
    settings = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "truncation": "right"}
    estimator = InfluenceEstimator(model, checkpoint, reference, **settings)
    full = estimator.score(candidates, progress=True)
    rows = []
    table = Table(title=f"{len(full)} candidates")
    for column in ("sample", "Spearman", "Pearson", "standard error / spread", "error / standard error"):
        table.add_column(column)
    for sample in SAMPLES:
        # Shares the preparation of the other: only the sample differs.
        sampled = copy.copy(estimator)
        sampled.options = replace(estimator.options, sample=sample)
        part = sampled.score(candidates)
        error = part.influence - full.influence
        row = {
            "sample": sample,
            "spearman": float(spearmanr(part.influence, full.influence).statistic),
            "pearson": float(pearsonr(part.influence, full.influence).statistic),
            "error_over_spread": float(np.median(part.standard_error) / full.influence.std()),
            "error_over_claimed": float(np.sqrt(np.mean((error / part.standard_error) ** 2))),
        }
        rows.append(row)
        table.add_row(*(f"{value:.4f}" for value in row.values()))
    path = write_result("sampling", arguments, {"rows": rows, "num_candidates": len(full)})
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
