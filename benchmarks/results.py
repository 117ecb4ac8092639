"""Writes benchmarks/RESULTS.md and its plots from the JSON files in benchmarks/results: `-m benchmarks.results`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plots
from benchmarks.common import RESULTS
from benchmarks.effect import summarise
from benchmarks.peers.entries import ENTRIES
from montessori.errors import ArgumentError

PAGE = Path(__file__).parent / "RESULTS.md"
OURS = "montessori"
EFFECTS = {"small": "responses tuned", "instructions": "instructions tuned instead"}
TITLES = {"smollm2": "SmolLM2-135M", "tiny": "four layers, briefly trained"}

HEAD = """# Results against peers, naive loops and real steps

Written by `python -m benchmarks.results` from the JSON files beside it; nothing here is typed by hand. `make bench`
runs one library of each kind and reads the demo's run; the command below a table runs all of it. Times are ratios
within one process on a shared machine: read the ratios. What the estimator costs alone, by kernel, memory and
precision, is in [docs/performance.md](../docs/performance.md).
"""

PEERS = """## Peers

Same model, candidates, references, threads and warm AdamW state; each peer in a process of its own, with the model
beside the one that the plain passes use. *Time* is that of scoring against plain forward + backward in the same
process, pair by pair: over the candidates, and over the references too where a peer passes over both at once (†).
*Once* is what it does before, the reference gradient first of all. *Memory* is the peak resident size above that of the
plain pass, preparation included. Agreement is with one real float32 step on each candidate, of all parameters; relative
errors stand where a score is a change of loss. Rows may come from runs of different days and states of the code
(`--core`, `--only`; always of the same examples, batches and threads), and two pairs each are few: the range in
brackets is all of them.
"""

NOT_AHEAD = """### Where we are not ahead

Every figure of the tables above in which a peer does better than `montessori`:
"""

REASONS = """
What is done once costs more here than elsewhere: the anchor takes a backward pass for each of its 8 pilots and one
more evaluation of the reference, and the capture is proved against autograd before the first candidate. None of it
grows with the number of candidates. The first-order rows go without the anchor. It can fall: pilot steps could come
from the capture in batches. The memory above a peer's is the anchor's too: while it is prepared, the weights, their
mean change and the reference gradient lie beside each other. The first-order rows are at or below the plain pass.
"""

NAIVE = """## Naive loops

One real step per candidate and the whole reference after it. *Optimised*: weights and optimizer state restored from
memory, references unpadded and in batches. *Published style*: the checkpoint read again for every candidate, every
sequence padded to 1,024 tokens. `montessori` with all that it does once.
"""

TRUTH = """## Agreement with real steps

Truth is one real AdamW step on each candidate in float32, reference loss before and after. *v frozen* leaves the
candidate's own gradient out of the second moment; *real step on bfloat16 parameters* is what a script measures that
steps and evaluates a bfloat16 model. Rounding the weights to bfloat16 moves every influence, so the truth of the rows
of a bfloat16 model is a float32 step from the rounded weights, with float32 m and v.
"""


def ratios(result: dict[str, Any]) -> np.ndarray:
    """Time of scoring over time of the plain pass, pair by pair."""
    return np.divide(result["seconds"]["score"], result["seconds"]["plain"])


def extra_memory(result: dict[str, Any]) -> float:
    """Bytes of peak resident size above the plain pass."""
    return result["peak_rss_bytes"]["score"] - result["peak_rss_bytes"]["plain"]


def covered(result: dict[str, Any]) -> float:
    return 1 - sum(result["left_out"].values()) / result["trainable"]


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def setting(record: dict[str, Any], command: str) -> str:
    """The machines and the command of a run."""
    options = record["settings"]
    named = ["candidates", "reference", "model", "scored", "num_references", "batch_size", "max_length", "threads"]
    given = " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in named if name in options)
    if "seeds" in options:
        given += f" --preset {options['preset']}" + (f" --name {options['name']}" if options.get("name") else "")
        given += f" --seeds {' '.join(map(str, options['seeds']))}"
        given += "".join(f" --set {assignment}" for assignment in options["assignments"])
    machines = dict.fromkeys(map(_machine, record.get("machines", [record.get("machine")])))
    return f"{'; '.join(machines)}.\n\n    python -m benchmarks.{command} {given}\n"


def _machine(found: dict[str, Any]) -> str:
    return f"{found['cpu']}, torch {found['versions']['torch']}, transformers {found['versions']['transformers']}"


def peers(record: dict[str, Any]) -> str:
    rows = []
    done = {result["name"]: result for result in record["peers"]}
    for name, entry in ENTRIES.items():
        result = done.get(name, {"name": name, "score": entry.score, "error": "not asked for yet"})
        label = [result["name"], result.get("version", ""), result["score"]]
        if "error" in result:
            rows.append([*label, f"not run: {result['error']}", *[""] * 8])
            continue
        pairs = ratios(result)
        time = f"{np.median(pairs):.2f} ({pairs.min():.2f}–{pairs.max():.2f}){'†' if result['over_references'] else ''}"
        outside = ", ".join(f"{kind} {size / 1e6:.2g} M" for kind, size in sorted(result["left_out"].items()))
        rows.append(
            [
                *label,
                time,
                f"{result['seconds']['prepare']:.1f} s",
                f"{extra_memory(result) / 1e9:+.2f} GB",
                f"{covered(result):.0%}",
                outside or "–",
                *agreement_cells(result.get("agreement")),
            ]
        )
    columns = ["", "version", "score", "time / plain", "once", "memory", "covered", "leaves out"]
    columns += ["Pearson", "Spearman", "sign", "median relative error"]
    return table(columns, rows)


def agreement_cells(agreement: dict[str, float] | None) -> list[str]:
    if agreement is None:
        return [""] * 4
    error = agreement.get("median_relative_error")
    figures = [f"{agreement['pearson']:.5f}", f"{agreement['spearman']:.3f}", f"{agreement['sign_agreement']:.0%}"]
    return [*figures, "" if error is None else f"{error:.2%}"]


def memory(record: dict[str, Any]) -> str:
    sizes = next((r["peaks"] for r in record["peers"] if "peaks" in r), [])
    columns = ["examples in a batch", *(str(peak["batch_size"]) for peak in sizes)]
    rows = []
    for result in record["peers"]:
        cells = [f"{(peak['score'] - peak['plain']) / 1e6:+.0f} MB" for peak in result.get("peaks", [])]
        rows.append([result["name"], *(cells or [f"not run: {result['error']}", *[""] * (len(sizes) - 1)])])
    return table(columns, rows)


def not_ahead(record: dict[str, Any]) -> str:
    """A line per figure in which a peer does better than the default method."""
    results = {result["name"]: result for result in record["peers"] if "error" not in result}
    if OURS not in results:
        return ""
    measures: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
        "time / plain": (lambda r: float(np.median(ratios(r))), "{:.2f}"),
        "done once, seconds": (lambda r: r["seconds"]["prepare"], "{:.1f}"),
        "extra memory, GB": (lambda r: extra_memory(r) / 1e9, "{:+.2f}"),
        "1 − Pearson": (lambda r: 1 - r.get("agreement", {"pearson": -1})["pearson"], "{:.1e}"),
    }
    lines = []
    for title, (value, form) in measures.items():
        ours = value(results[OURS])
        better = [
            f"{name} {form.format(value(result))}"
            for name, result in results.items()
            if not name.startswith(OURS)
            and name != "real step"
            and value(result) < ours
            and form.format(value(result)) != form.format(ours)
        ]
        if better:
            lines.append(f"- {title}, {TITLES[record['settings']['model']]}: {form.format(ours)}; {', '.join(better)}")
    return "\n".join(lines) + "\n" if lines else f"- {TITLES[record['settings']['model']]}: none.\n"


def naive(record: dict[str, Any]) -> str:
    measured = [
        [row["method"], row["phase"], str(row["n"]), str(row["r"]), f"{row['seconds']:.1f} s" + row["cold"] * ", cold"]
        for row in record["measured"]
    ]
    errors = ", ".join(f"{method} {error:.0%}" for method, error in record["fit_error"].items())
    modelled = [
        [
            str(row["n"]),
            str(row["r"]),
            *(f"{row[method]:,.0f} s" for method in ("montessori", "optimised", "published")),
            f"{row['optimised'] / row['montessori']:.1f}",
            f"{row['published'] / row['montessori']:.1f}",
        ]
        for row in record["modelled"]
    ]
    columns = ["candidates", "references", "montessori", "optimised", "published style"]
    columns += ["optimised / montessori", "published / montessori"]
    return (
        "Measured:\n\n"
        + table(["", "phase", "candidates", "references", "time"], measured)
        + "\n**Modelled**, from the terms of each cost fitted to the points above that are not cold (largest error "
        f"there: {errors}), for the first rows of the data, beyond their number at their mean lengths "
        f"({np.mean(record['tokens']['candidates']):.0f} and {np.mean(record['tokens']['references']):.0f} tokens):\n\n"
        + table(columns, modelled)
    )


def precisions(record: dict[str, Any]) -> str:
    rows = [[name, str(a["num_examples"]), *agreement_cells(a), _largest(a)] for name, a in record["agreement"].items()]
    columns = ["", "candidates", "Pearson", "Spearman", "sign", "median relative error", "largest"]
    return table(columns, rows)


def truth_row(record: dict[str, Any]) -> str:
    return precisions(record) + f"\nCurvature seen by the anchor: {record['curvature'][0]:.1e}.\n"


def _largest(agreement: dict[str, float]) -> str:
    error = agreement.get("max_relative_error")
    return "" if error is None else f"{error:.1%}"


def truth_sweeps(record: dict[str, Any]) -> str:
    parts = []
    for name, rows in record["sweeps"].items():
        methods = list(rows[0]["agreement"])
        cells = [
            [
                f"{row['value']:g}",
                f"{row['curvature'][0]:.1e}",
                *(_short(row["agreement"][method]) for method in methods),
            ]
            for row in rows
        ]
        parts.append(table([f"`{name}`", "curvature", *methods], cells))
    return (
        "Sweeps on the small model, one setting at a time (lr 5e-6, 12 warm-up steps, β2 0.999, 128 tokens otherwise). "
        "Cells: Pearson · sign agreement · median relative error. *Curvature* is how far the anchor's own loss change "
        "and its linear prediction lie apart, over the sum of their sizes; the estimator reports it without a step on "
        "any candidate, and warns above 0.1.\n\n" + "\n".join(parts)
    )


def _short(agreement: dict[str, float]) -> str:
    error = agreement.get("median_relative_error")
    return f"{agreement['pearson']:.4f} · {agreement['sign_agreement']:.0%}" + (
        "" if error is None else f" · {error:.1%}"
    )


def loop(record: dict[str, Any]) -> str:
    stages = record["stages"]
    whole = sum(row["seconds"] for row in stages)
    rows = [
        [row["stage"], f"{row['seconds']:.0f} s", f"{row['seconds'] / whole:.0%}", f"{row['tokens']:,}"]
        for row in stages
    ]
    return table(["stage", "time", "share", "tokens"], [*rows, ["all", f"{whole:.0f} s", "100%", ""]])


def pooled_effect(name: str) -> dict[str, Any] | None:
    """The seeds of `benchmarks.effect` that have been run, as one record, in the order of their numbers."""
    paths = RESULTS.glob(f"effect_{name}_*.json")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not records:
        return None
    records.sort(key=lambda record: record["settings"]["seeds"])
    first = records[0]["settings"]
    for record in records:
        settings = record["settings"]
        if settings["assignments"] != first["assignments"]:
            raise ArgumentError(
                f"effect_{name}: expected the settings of seed {first['seeds'][0]}, {first['assignments']}, in seed "
                f"{settings['seeds'][0]} too, found {settings['assignments']}: run it again"
            )
    return {
        "settings": {**first, "seeds": [seed for record in records for seed in record["settings"]["seeds"]]},
        "machines": [record["machine"] for record in records],
        "seeds": records,
        "overall": summarise(records),
    }


def effect(record: dict[str, Any]) -> str:
    rows = []
    for number, found in zip(record["settings"]["seeds"], record["seeds"], strict=True):
        means = [np.mean(found["held_out"][name]) for name in ("tuned", "untuned", "base")]
        accuracy = found["validation_accuracy"]
        cells = [f"{found['difference']:+.2e}", f"{found['p']:.2g}", *(f"{mean:.4f}" for mean in means)]
        rows.append([str(number), str(found["num_pairs"]), "–" if accuracy is None else f"{accuracy:.0%}", *cells])
    columns = ["seed", "pairs", "held-out pairs ranked right", "influence, tuned − untuned", "p"]
    columns += [f"held-out loss, {name}" for name in ("tuned", "Self-Instruct", "untrained student")]
    overall = record["overall"]
    difference, below = overall["difference"], overall["below_self_instruct"]
    return (
        table(columns, rows)
        + f"\nAll seeds: influence {difference['mean']:+.2e} ({difference['low']:+.2e} to {difference['high']:+.2e}), "
        f"one-sided p = {overall['p']:.2g}; held-out loss below that of the Self-Instruct student by "
        f"{below['mean']:+.4f} ({below['low']:+.4f} to {below['high']:+.4f}). Scoring takes "
        f"{overall['share_of_scoring']:.0%} of a round.\n"
    )


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def section(name: str, title: str, command: str, render: Callable[[dict[str, Any]], str]) -> list[str]:
    """Title, setting and tables of one JSON file, or that it has not been run."""
    return render_section(load(name), title, command, render)


def render_section(
    record: dict[str, Any] | None, title: str, command: str, render: Callable[[dict[str, Any]], str]
) -> list[str]:
    if record is None:
        return [f"### {title}\n", "Not run yet.\n"]
    return [f"### {title}\n", render(record), setting(record, command)]


def image(path: Path | None, text: str) -> list[str]:
    return [] if path is None else [f"![{text}]({path.relative_to(PAGE.parent)})\n"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    parts = [HEAD, PEERS]
    for model, title in TITLES.items():
        parts += section(f"peers_{model}", title, "peers", peers)
    parts += image(plots.pareto(load("peers_smollm2")), "fidelity against cost, SmolLM2-135M")
    parts += section("peers_memory", "Memory against the batch, four layers", "peers.memory", memory)
    parts += image(plots.memory(load("peers_memory")), "extra peak memory against the number of examples in a batch")
    compared = [record for model in TITLES if (record := load(f"peers_{model}"))]
    parts += [NOT_AHEAD, "".join(map(not_ahead, compared)), REASONS, NAIVE]
    parts += section("naive_smollm2", TITLES["smollm2"], "naive", naive)
    parts += image(plots.speed(load("naive_smollm2")), "seconds against the number of candidates")
    parts += [TRUTH, *section("truth_smollm2", TITLES["smollm2"], "truth", truth_row)]
    parts += image(plots.scatter(load("truth_smollm2")), "predicted against real influence")
    title = "By precision of weights, m and v, SmolLM2-135M"
    parts += section("truth_precisions", title, "truth --precisions", precisions)
    parts += section("truth_tiny", "A small model, by setting", "truth", truth_sweeps)
    parts += ["## The loop\n", *section("loop_demo", "One round of the preset `demo`", "loop --preset demo", loop)]
    for name, title in EFFECTS.items():
        title = f"Tuned teacher against Self-Instruct, preset `small`, {title}"
        parts += render_section(pooled_effect(name), title, "effect", effect)
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
