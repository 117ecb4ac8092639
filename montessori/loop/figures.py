"""The pictures of a report, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from montessori.inspection import bin_edges

BEFORE, AFTER, NEUTRAL = "#8a8f98", "#1f6fb4", "#c4582a"


def influence_figure(scored: np.ndarray | None, drift: float | None, real: Mapping[str, Sequence[float]]) -> Figure:
    """Left: influence of the scored probing set, float [N]. Right: real influence of fresh samples by teacher."""
    panels = [panel for panel in (scored is not None, bool(real)) if panel]
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, len(panels))))
    if scored is not None:
        left = axes.pop(0)
        finite = scored[np.isfinite(scored)]
        if len(finite):
            left.hist(finite, bins=bin_edges(finite, 40), color=BEFORE)
        left.set(title="probing set, as scored", xlabel="influence (nats per token)", ylabel="candidates")
        if drift is not None:
            left.axvline(drift, color=NEUTRAL, linestyle="--", linewidth=1, label="step with g = 0")
            left.legend(frameon=False)
    if real:
        right = axes.pop(0)
        values = {name: np.array([v for v in found if v is not None]) for name, found in real.items()}
        edges = bin_edges(np.concatenate(list(values.values())), 20)
        for name, color in (("untuned", BEFORE), ("tuned", AFTER)):
            if name in values:
                right.hist(values[name], bins=edges, color=color, alpha=0.6, label=f"{name} teacher")
                right.axvline(values[name].mean(), color=color, linewidth=1.5)
        right.set(title="rows of each teacher, by real steps", xlabel="influence (nats per token)", ylabel="rows")
        right.legend(frameon=False)
    return figure


def pairs_figure(prompts_by_num_pairs: Mapping[str, int]) -> Figure:
    """How many prompts gave how many pairs."""
    figure = Figure(figsize=(4.6, 3), layout="constrained")
    axes = figure.subplots()
    sizes = sorted(prompts_by_num_pairs, key=int)
    bars = axes.bar(sizes, [prompts_by_num_pairs[size] for size in sizes], color=AFTER)
    axes.bar_label(bars)
    axes.set(xlabel="pairs of one prompt", ylabel="prompts")
    return figure


def margins_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Reward margin and accuracy of DPO by step, with those of the validation pairs at the end."""
    figure = Figure(figsize=(9.2, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in (
        (left, "rewards/margins", "margin: β × (log-ratio of chosen − of rejected)"),
        (right, "rewards/accuracies", "share of pairs in the right order"),
    ):
        steps, values = _series(metrics, key)
        axes.plot(steps, values, color=AFTER, linewidth=1.2, label="training pairs")
        at, held = _series(metrics, f"eval_{key}")
        axes.plot(at, held, "o", color=NEUTRAL, label="validation pairs")
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
    left.axhline(0, color="black", linewidth=0.6)
    right.axhline(0.5, color="black", linewidth=0.6)
    return figure


def losses_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss by step, one panel per named run."""
    figure = Figure(figsize=(4.6 * len(curves), 3), layout="constrained")
    for axes, (name, metrics) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        axes.plot(*_series(metrics, "loss"), color=AFTER, linewidth=1.2)
        axes.set(title=name, xlabel="step", ylabel="training loss")
    return figure


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[key]) for entry in metrics if key in entry]
    return [step for step, _ in found], [value for _, value in found]
