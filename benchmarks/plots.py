"""Plots of benchmarks/RESULTS.md; each returns the PNG's path, or None without its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from benchmarks.truth import REAL, REAL_ROUNDED, truth_of


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, name: str) -> Path:
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def pareto(record: dict[str, Any] | None) -> Path | None:
    """1 − Pearson against time over plain forward + backward; lower left is better."""
    if record is None:
        return None
    figure, axes = _figure()
    for result in record["peers"]:
        if "agreement" not in result:
            continue
        name = result["name"]
        cost = np.median(np.divide(result["seconds"]["score"], result["seconds"]["plain"]))
        ours = name.startswith("montessori")
        error = max(1 - result["agreement"]["pearson"], 1e-9)
        axes.scatter(cost, error, color="tab:blue" if ours else "tab:gray", marker="o" if ours else "s")
        # Ours above, the others below: exact Adam on the same layers falls on one height.
        axes.annotate(name, (cost, error), xytext=(5, 4 if ours else -9), textcoords="offset points", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
    axes.set_xlabel("time of scoring / plain forward + backward")
    axes.set_ylabel("1 − Pearson with real steps")
    return _save(figure, "pareto")


def speed(record: dict[str, Any] | None) -> Path | None:
    """Seconds against N at the largest R: modelled lines, and the measured points at their own R."""
    if record is None:
        return None
    figure, axes = _figure()
    largest = max(row["r"] for row in record["modelled"])
    rows = [row for row in record["modelled"] if row["r"] == largest]
    for method, colour in (("published", "tab:red"), ("optimised", "tab:orange"), ("montessori", "tab:blue")):
        axes.plot(
            [row["n"] for row in rows],
            [row[method] for row in rows],
            "--",
            color=colour,
            label=f"{method}, modelled, {largest} references",
        )
        points = [row for row in record["measured"] if row["method"] == method and row["phase"] == "loop"]
        axes.scatter([row["n"] for row in points], [row["seconds"] for row in points], color=colour, s=18)
        for row in points:
            place = (row["n"], row["seconds"])
            axes.annotate(f"{row['r']} ref.", place, xytext=(4, -8), textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("candidates")
    axes.set_ylabel("seconds (points: whole loops, measured)")
    axes.legend(fontsize=7)
    return _save(figure, "speed_against_n")


def scatter(record: dict[str, Any] | None) -> Path | None:
    """Predicted against real influence per candidate, for the scores that are changes of loss."""
    if record is None:
        return None
    figure, axes = _figure()
    influence = record["influence"]
    real = {name: np.array(influence[name]) for name in (REAL, REAL_ROUNDED)}
    markers = {"anchored": "o", "first order": "x", "v frozen": "^", "real step on bfloat16 parameters": "s"}
    for name, marker in markers.items():
        axes.scatter(real[truth_of(name)], influence[name], marker=marker, s=18, alpha=0.8, label=name)
    ends = np.array([min(map(np.min, real.values())), max(map(np.max, real.values()))])
    axes.plot(ends, ends, color="black", linewidth=0.7)
    axes.set_xlabel("real float32 step: reference loss before − after")
    axes.set_ylabel("predicted, or measured in bfloat16")
    axes.legend(fontsize=7)
    return _save(figure, "agreement")


def memory(record: dict[str, Any] | None) -> Path | None:
    """Extra peak memory against the number of examples in a batch."""
    if record is None:
        return None
    figure, axes = _figure()
    for result in record["peers"]:
        if "peaks" not in result:
            continue
        sizes = [peak["batch_size"] for peak in result["peaks"]]
        extra = [(peak["score"] - peak["plain"]) / 1e6 for peak in result["peaks"]]
        width = 2.5 if result["name"].startswith("montessori") else 1.2
        axes.plot(sizes, extra, marker="o", markersize=3, linewidth=width, label=result["name"])
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("examples in a batch")
    axes.set_ylabel("peak memory above plain forward + backward, MB")
    axes.legend(fontsize=7)
    return _save(figure, "memory_against_batch")
