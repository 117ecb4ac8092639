"""One page about a run: what was scored, paired, tuned and gained, and what it cost."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from montessori.data import load_rows
from montessori.errors import ArgumentError
from montessori.loop.evaluate import EVALUATION_FILE
from montessori.loop.fit import METRICS_FILE, SUMMARY_FILE
from montessori.loop.rundir import REPORT_FILE, RunDirectory
from montessori.loop.score import AUDIT_FILE
from montessori.scores import Scores
from montessori.writing import read_json, written_whole

EXTREMES = 5


@dataclass
class _Round:
    title: str
    name: str
    numbers: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    extremes: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)


def run(directory: Path, costs: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `directory/report.html`, self-contained, and its pictures as PNG beside it; return the page.

    `costs`: seconds and tokens by stage, as `RunDirectory.costs` gives them. Stages that have not been run
    are left out. Raises ArgumentError when the directory holds no round.
    """
    folders = RunDirectory(directory).rounds()
    if not folders:
        raise ArgumentError(f"{directory}: expected the directory of a run, with round_1 in it")
    rounds = [_describe(folder, directory) for folder in folders]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("montessori.loop").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(title=f"montessori: {directory.name}", rounds=rounds, costs=cost_rows(costs))
    path = directory / REPORT_FILE
    with written_whole(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Stage, seconds, share of all seconds, tokens and tokens per second; the last row is the sum."""
    total = sum(cost["seconds"] for cost in costs.values())
    rows = []
    for stage, cost in costs.items():
        seconds, tokens = cost["seconds"], cost.get("tokens", 0)
        rate = f"{tokens / seconds:,.0f}" if tokens and seconds else ""
        share = f"{seconds / total:.0%}" if total else ""
        rows.append([stage, f"{seconds:,.1f}", share, f"{tokens:,}" if tokens else "", rate])
    if rows:
        rows.append(["all", f"{total:,.1f}", "100%", "", ""])
    return rows


def headline(directory: Path) -> list[tuple[str, str]]:
    """The numbers of the last round that has any, as name and text, for the terminal."""
    found = [_numbers(folder) for folder in RunDirectory(directory).rounds()]
    return next((numbers for numbers in reversed(found) if numbers), [])


def _describe(folder: Path, directory: Path) -> _Round:
    page = _Round(folder.name.replace("_", " "), folder.name, _numbers(folder))
    _add_influence(page, folder, directory)
    _add_training(page, folder, directory)
    return page


def _numbers(folder: Path) -> list[tuple[str, str]]:
    numbers: list[tuple[str, str]] = []
    pairs, tuning = _json(folder / "pairs" / SUMMARY_FILE), _json(folder / "tune" / SUMMARY_FILE)
    audit = _json(folder / "score" / AUDIT_FILE)
    for name, found in (audit or {}).get("agreement", {}).items():
        told = "Pearson {pearson:.4f}, signs alike {sign_agreement:.0%}, n = {num_examples}".format(**found)
        numbers.append((f"predicted against real influence, {name}", told))
    if pairs:
        numbers += [
            ("candidates with a value", str(pairs["num_valued"])),
            ("preference pairs", str(pairs["num_pairs"])),
            ("prompts without a pair", f"{pairs['prompts_without_pairs']} of {pairs['num_prompts']}"),
            ("positive : negative", "{positive} : {negative}".format(**pairs["sign"])),
            ("positive : negative, centred", "{positive} : {negative}".format(**pairs["sign_centred"])),
        ]
    if tuning:
        last = next((e for e in reversed(_metrics(folder / "tune")) if "eval_rewards/accuracies" in e), None)
        numbers.append(("pairs tuned on", str(tuning["num_pairs"])))
        if last:
            numbers.append(("validation pairs in the right order", f"{last['eval_rewards/accuracies']:.0%}"))
    evaluation = _json(folder / "evaluate" / EVALUATION_FILE)
    before = "untuned teacher" if folder.name == "round_1" else "teacher of the round before"
    return numbers + (_evaluation_numbers(evaluation, before) if evaluation else [])


def _evaluation_numbers(evaluation: Mapping[str, Any], before: str) -> list[tuple[str, str]]:
    numbers = []
    influence = evaluation.get("influence", {})
    for name, teacher in (("untuned", before), ("tuned", "tuned teacher")):
        if name in influence:
            mean = influence[name]["mean"]
            told = "no row can be scored" if mean is None else _interval(mean, "{:+.2e}")
            numbers.append((f"real influence, {teacher}", told))
    if "comparison" in influence:
        compared = influence["comparison"]
        text = f"{_interval(compared['difference'], '{:+.2e}')}, one-sided p = {compared['p']:.4f}"
        numbers.append((f"tuned teacher above {before} by", text))
    for name, entry in evaluation["held_out"]["models"].items():
        numbers.append((f"held-out loss, {name}", _interval(entry["loss"], "{:.4f}")))
    for name, entry in evaluation["held_out"]["below"].items():
        numbers.append((f"student below {name} by", _interval(entry, "{:+.4f}")))
    for name, rate in evaluation.get("win_rate", {}).items():
        numbers.append((f"win rate against {name}", _interval(rate["win_rate"], "{:.1%}")))
        controlled = rate["length_controlled"]
        told = "all lengths differ alike" if controlled is None else f"{controlled:.1%}"
        numbers.append((f"win rate against {name}, length-controlled", told))
        if rate.get("unread"):
            numbers.append((f"verdicts against {name} that the judge did not give", str(rate["unread"])))
    return numbers


def _interval(entry: Mapping[str, Any], form: str) -> str:
    mean, low, high = (form.format(entry[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}], n = {entry['n']}"


def _add_influence(page: _Round, folder: Path, directory: Path) -> None:
    from montessori.loop import figures

    scores_file, rows_file = folder / "score" / "scores.parquet", folder / "generate" / "probe.jsonl"
    evaluation = _json(folder / "evaluate" / EVALUATION_FILE) or {}
    measured = {name: entry.get("influence", ()) for name, entry in evaluation.get("influence", {}).items()}
    real = {name: found for name, found in measured.items() if any(value is not None for value in found)}
    values, scores = None, None
    if scores_file.is_file():
        scores = Scores.load(scores_file)
        values = scores.influence.reshape(len(scores), -1).mean(axis=1)
    if values is not None or real:
        drift = None if scores is None else float(np.mean(scores.drift))
        note = "Influence: reference loss before one step minus after it. Vertical lines on the right are means."
        _picture(page, directory, "influence", figures.influence_figure(values, drift, real), note)
    if scores is not None and values is not None and rows_file.is_file():
        centred = scores.centred.reshape(len(scores), -1).mean(axis=1)
        page.extremes = _extremes(load_rows(rows_file), values, centred)


def _add_training(page: _Round, folder: Path, directory: Path) -> None:
    from montessori.loop import figures

    pairs = _json(folder / "pairs" / SUMMARY_FILE)
    if pairs:
        _picture(page, directory, "pairs per prompt", figures.pairs_figure(pairs["prompts_by_num_pairs"]))
    tuning, training = _metrics(folder / "tune"), _metrics(folder / "train")
    if any("rewards/margins" in entry for entry in tuning):
        _picture(page, directory, "margins of DPO", figures.margins_figure(tuning))
    curves = {name: found for name, found in (("teacher", tuning), ("student", training)) if found}
    if curves:
        _picture(page, directory, "training losses", figures.losses_figure(curves))


def _picture(page: _Round, directory: Path, title: str, figure: Any, note: str = "") -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    path = directory / f"{page.name}_{title.replace(' ', '_').lower()}.png"
    with written_whole(path) as partial:
        partial.write_bytes(buffer.getvalue())
    page.pictures.append({"title": title, "data": base64.b64encode(buffer.getvalue()).decode(), "note": note})


def _extremes(
    rows: Sequence[Mapping[str, Any]], values: np.ndarray, centred: np.ndarray
) -> list[tuple[str, list[dict[str, str]]]]:
    finite = np.flatnonzero(np.isfinite(values))
    ranked = finite[np.argsort(values[finite], kind="stable")]

    def shown(indices: np.ndarray) -> list[dict[str, str]]:
        return [
            {
                "id": rows[i]["id"],
                "influence": f"{values[i]:+.3e}",
                "centred": f"{centred[i]:+.3e}",
                "written": _written(rows[i]),
                "response": rows[i]["response"],
            }
            for i in map(int, indices)
        ]

    return [
        ("highest influence", shown(ranked[::-1][:EXTREMES])),
        ("lowest influence", shown(ranked[:EXTREMES])),
    ]


def _written(row: Mapping[str, Any]) -> str:
    """What was written before the answer; of a tuned answer, which is the completion itself, what it answers."""
    return row["instruction" if row["response"].endswith(row["completion"]) else "completion"]


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    return list(load_rows(path)) if path.is_file() and path.stat().st_size else []
