"""Agreement of each method with real float32 steps on SmolLM2-135M, and a scatter plot.

python -m benchmarks.fidelity --candidates seed_tasks_175.jsonl --reference reference_256.jsonl
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.common import MAX_LENGTH, RESULTS, load_data, parser, warm_student, warmup_name, write_result
from montessori import InfluenceEstimator
from montessori.agreement import Agreement
from montessori.inspection import agreement_table
from montessori.models import load_model

METHODS = ("anchored", "first_order", "exact")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    everything, candidates, reference = load_data(arguments)
    checkpoint = warm_student(everything, arguments)
    model, tokenizer = load_model(checkpoint)
    settings = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "truncation": "right"}
    scores = {
        method: InfluenceEstimator(model, checkpoint, reference, method, **settings).score(candidates, progress=True)
        for method in METHODS
    }
    real = scores["exact"]
    agreements, centred = {}, {}
    for method in METHODS[:2]:
        agreements[method] = Agreement.of(scores[method].influence, real.influence)
        centred[method] = Agreement.of(scores[method].centred, real.centred)
    _plot(scores, RESULTS / f"fidelity{warmup_name(arguments)}.png")
    path = write_result(
        f"fidelity{warmup_name(arguments)}",
        arguments,
        {
            "agreement": {method: value.to_dict() for method, value in agreements.items()},
            "centred_agreement": {method: value.to_dict() for method, value in centred.items()},
            "influence": {method: value.influence.tolist() for method, value in scores.items()},
            "drift": {method: value.drift for method, value in scores.items()},
            "curvature": scores["anchored"].info["curvature"],
        },
    )
    console = Console()
    console.print(agreement_table("influence against real float32 steps", agreements))
    console.print(agreement_table("centred influence against real float32 steps", centred))
    console.print(f"wrote {path}")


def _plot(scores: dict, path: Path) -> None:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    real = scores["exact"].influence
    for method, marker in (("first_order", "x"), ("anchored", "o")):
        axes.scatter(real, scores[method].influence, marker=marker, s=18, label=method, alpha=0.8)
    ends = np.array([real.min(), real.max()])
    axes.plot(ends, ends, color="black", linewidth=0.7, label="equal")
    axes.set_xlabel("real step: reference loss before − after")
    axes.set_ylabel("predicted, no step taken")
    axes.legend()
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
