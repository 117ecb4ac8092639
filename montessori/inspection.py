"""Looking at scores: the best and worst candidates, and the histogram for terminal and PNG."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from montessori.agreement import Agreement
from montessori.errors import ArgumentError
from montessori.scores import Scores
from montessori.writing import written_whole

QUANTITIES = ("influence", "centred")
BAR = 40
BINS = 16
SHOWN_CAUSES = 3
_ORDERS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def select(scores: Scores, quantity: str = "influence", name: str | None = None) -> np.ndarray:
    """float64 [N]: influence or centred influence on one reference set (the first by default)."""
    if quantity not in QUANTITIES:
        raise ArgumentError(f"quantity={quantity!r}: expected one of {', '.join(QUANTITIES)}")
    name = scores.names[0] if name is None else name
    if name not in scores.names:
        raise ArgumentError(f"reference set {name!r}: expected one of {', '.join(scores.names)}")
    values = getattr(scores, quantity).reshape(len(scores), -1)
    return values[:, scores.names.index(name)]


def print_summary(console: Console, scores: Scores) -> None:
    """How many were scored and why others were not, the drift and the share of each sign."""
    skipped = scores.skipped
    console.print(f"{len(scores)} candidates, {len(scores) - len(skipped)} scored by [bold]{scores.method}[/bold]")
    for reason in sorted(set(skipped.values())):
        rows = [str(row) for row, why in skipped.items() if why == reason]
        shown = f"{', '.join(rows[:10])}{' …' if rows[10:] else ''}"
        console.print(f"  not scored ({reason}): {len(rows)}, rows {shown}", markup=False)
        # Why a row is no example differs from row to row.
        causes = [why for row in rows if (why := scores.info.get("invalid", {}).get(row)) and reason == "invalid"]
        for why in causes[:SHOWN_CAUSES]:
            console.print(f"    {why}", markup=False, soft_wrap=True)
    if len(skipped) == len(scores):
        return
    drift = np.atleast_1d(scores.drift)
    loss = np.atleast_1d(scores.reference_loss)
    for k, name in enumerate(scores.names):
        values = select(scores, "influence", name)[scores.ok]
        centred = select(scores, "centred", name)[scores.ok]
        console.print(
            f"  {name}: loss {loss[k]:.4f}, drift {drift[k]:+.3e}, positive influence "
            f"{np.mean(values > 0):.0%}, positive centred influence {np.mean(centred > 0):.0%}",
            markup=False,
        )


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Edges of so many bins of equal width over finite `values`; around them where they are all the same."""
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high))
    size = size if size > 1e-290 else 1.0
    # No bin can be narrower than the roundings of such values; and they are to lie within one, not at an edge.
    if high - low <= 1e-12 * size:
        low, high = low - size, high + 1.1 * size
    return np.linspace(low, high, bins + 1)


def print_histogram(console: Console, values: np.ndarray, title: str) -> None:
    """Counts per bin as bars of text, and how many of the `values`, float [n], are not finite and in no bin."""
    finite = values[np.isfinite(values)]
    console.print(Text(title, style="bold"))
    if len(finite) < len(values):
        console.print(f"not finite: {len(values) - len(finite)}")
    if not len(finite):
        return
    counts, edges = np.histogram(finite, bins=bin_edges(finite, BINS))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(BAR * count / max(counts.max(), 1)) or ("▏" if count else "")
        console.print(Text(f"{low:+.2e} … {high:+.2e} {count:5d} {bar}"))


def save_histogram(scores: Scores, path: Path, quantity: str = "influence", names: Sequence[str] = ()) -> None:
    """Histogram of the reference sets `names`, by default all, as a PNG; values that are not finite are left out.

    Raises ArgumentError for a name that does not end in .png, and for a set without a finite value; ResourceError
    when it cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ArgumentError(f"{path}: expected a name that ends in .png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    names = names or scores.names
    for name in names:
        values = select(scores, quantity, name)
        values = values[scores.ok & np.isfinite(values)]
        if not len(values):
            raise ArgumentError(f"{path}: expected a finite {quantity} on {name} of some candidate, got none to draw")
        axes.hist(values, bins=bin_edges(values, 40).tolist(), alpha=0.7, label=name)
    axes.axvline(0, color="black", linewidth=0.8)
    if quantity == "influence":
        for name in names:
            value = np.atleast_1d(scores.drift)[scores.names.index(name)]
            if np.isfinite(value):
                axes.axvline(value, color="tab:red", linewidth=0.8, linestyle="--", label="drift (step with g = 0)")
    axes.set_xlabel(f"{quantity}: reference loss before the step minus after it (nats per token)")
    axes.set_ylabel("candidates")
    axes.legend()
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})


def print_extremes(
    console: Console, scores: Scores, values: np.ndarray, count: int, rows: Sequence[Mapping] | None
) -> None:
    """The `count` highest and lowest candidates, with their text when `rows` are given."""
    order = np.argsort(np.where(np.isfinite(values), values, -np.inf), kind="stable")
    ranked = order[len(order) - int(np.isfinite(values).sum()) :]
    for title, chosen in (("highest", ranked[::-1][:count]), ("lowest", ranked[:count])):
        table = Table(title=f"{title} {len(chosen)}", title_justify="left")
        for column, width in (("row", 6), ("value", 10), ("loss", 6), ("tokens", 6)):
            table.add_column(column, justify="right", no_wrap=True, min_width=width)
        if rows is not None:
            table.add_column("text", no_wrap=True)
        for index in chosen:
            cells = [
                str(index),
                f"{values[index]:+.3e}",
                f"{scores.loss[index]:.3f}",
                str(scores.num_tokens[index]),
            ]
            table.add_row(
                *cells,
                *([Text(_shortened(_one_line(rows[int(index)]), console.width - 46))] if rows is not None else []),
            )
        console.print(table)


def agreement_table(title: str, agreements: Mapping[str, Agreement]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("reference", "n", "Pearson", "Spearman", "sign agreement", "median rel. error", "max"):
        table.add_column(column, justify="left" if column == "reference" else "right")
    for name, a in agreements.items():
        table.add_row(
            Text(name),
            str(a.num_examples),
            f"{a.pearson:.6f}",
            f"{a.spearman:.4f}",
            f"{a.sign_agreement:.0%}",
            f"{a.median_relative_error:.3%}",
            f"{a.max_relative_error:.3%}",
        )
    return table


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _one_line(row: Mapping) -> str:
    keys = ("messages", "conversations", "instruction", "input", "prompt", "response", "completion", "output", "text")
    parts = [part for key in keys if row.get(key) is not None for part in _texts(row[key])]
    text = " → ".join(" ".join(part.split()) for part in parts if part.strip())
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_obeyed(character) else character for character in text)


def _is_obeyed(character: str) -> bool:
    """Whether a terminal does something for it, or shows what follows in another order."""
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _ORDERS


def _texts(value: object) -> list[str]:
    """The text of a column; of a list of messages that of each, whose content may be a list of parts."""
    if isinstance(value, Mapping):
        named = (value.get(key) for key in ("content", "value", "text"))
        return [" ".join(_texts(next((found for found in named if found is not None), "")))]
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry)]
    return [str(value)]
