"""Preference pairs of siblings: what the teacher wrote for one prompt, the helpful above the harmful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from montessori.errors import ArgumentError, DataError
from montessori.loop.section import Section
from montessori.loop.signals import Signal
from montessori.writing import write_json, write_jsonl

PAIRS_FILE = "pairs.jsonl"
SUMMARY_FILE = "summary.json"
# Sorts as pairs do: the difference with its sign turned, ids of the chosen and the rejected, and their row numbers.
_Found = tuple[float, str, str, int, int]


class PairSettings(Section):
    """Which siblings are set against each other.

    `rule`: "sign" pairs every helpful candidate (value > 0) with every harmful one (value < 0) of the same
    prompt; "centred" does so by the value without the drift that all candidates share; "difference" pairs
    any two siblings. `margin`: smallest difference of the two values, in the unit of the signal (for
    influence: nats per token; twice the error found by an audit keeps pairs that the error cannot turn).
    `per_prompt`: at most so many pairs of one prompt, `top_k`: of all; the largest differences stay.
    """

    rule: Literal["sign", "centred", "difference"] = "sign"
    margin: float = Field(default=0.0, ge=0)
    per_prompt: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)


def run(settings: PairSettings, rows: Sequence[Mapping[str, Any]], signal: Signal, out: Path) -> dict[str, Any]:
    """Write the pairs of `rows` to `out/pairs.jsonl` and what was counted to `out/summary.json`; return that.

    `signal` holds one value per row; rows without a finite value take no part.
    Raises DataError when no pair comes out, with the reason and what to change.
    """
    if len(rows) != len(signal.values):
        raise ArgumentError(f"expected one value per row, got {len(signal.values)} for {len(rows)} rows")
    pairs = make_pairs(settings, rows, signal)
    if not pairs:
        raise DataError(_no_pairs(settings, rows, signal))
    summary = summarise(settings, rows, signal, pairs)
    write_jsonl(out / PAIRS_FILE, pairs)
    write_json(out / SUMMARY_FILE, summary)
    return summary


def make_pairs(settings: PairSettings, rows: Sequence[Mapping[str, Any]], signal: Signal) -> list[dict[str, Any]]:
    """The pairs, prompts in the order of `rows`, within a prompt by falling difference; of siblings with the same text
    two texts make one pair, that of the largest difference."""
    values = signal.centred if settings.rule == "centred" else signal.values
    # The most that can stay of one prompt, so that of many siblings not every pair is held.
    most = min((number for number in (settings.per_prompt, settings.top_k) if number is not None), default=None)
    found: list[_Found] = []
    for siblings in _by_prompt(rows, values):
        of_each = (_best(_below(settings, rows, values, better, siblings), rows, most) for better in siblings)
        found += _best(chain.from_iterable(of_each), rows, most)
    if settings.top_k is not None and len(found) > settings.top_k:
        kept = sorted(range(len(found)), key=lambda i: (found[i][0], i))[: settings.top_k]
        found = [found[i] for i in sorted(kept)]
    return [_pair(rows, values, better, worse) for *_, better, worse in found]


def _best(pairs: Iterable[_Found], rows: Sequence[Mapping[str, Any]], most: int | None) -> list[_Found]:
    """The first `most` of `pairs` in their order, all if None; of those of two texts only the first counts."""
    first: dict[frozenset[str], _Found] = {}
    for pair in sorted(pairs):
        if len(first) == most:
            break
        first.setdefault(frozenset(rows[index]["completion"] for index in pair[3:]), pair)
    return list(first.values())


def summarise(
    settings: PairSettings, rows: Sequence[Mapping[str, Any]], signal: Signal, pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Counts that say how the pairs came about, for JSON."""
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    per_prompt = Counter(pair["prompt_id"] for pair in pairs)
    sizes = Counter(per_prompt[prompt] for prompt in prompts)
    return {
        "signal": signal.name,
        "rule": settings.rule,
        "num_rows": len(rows),
        "num_valued": int(np.isfinite(signal.values).sum()),
        "num_prompts": len(prompts),
        "num_pairs": len(pairs),
        "prompts_without_pairs": sizes[0],
        "prompts_with_one_candidate": sum(len(siblings) == 1 for siblings in _by_prompt(rows, signal.values)),
        "prompts_by_num_pairs": {str(size): sizes[size] for size in sorted(sizes)},
        "sign": _signs(signal.values),
        "sign_centred": _signs(signal.centred),
        "mean_difference": float(np.mean([_difference(pair) for pair in pairs])) if pairs else None,
    }


def _by_prompt(rows: Sequence[Mapping[str, Any]], values: np.ndarray) -> Iterator[list[int]]:
    """Row numbers of the siblings that have a value, one list per prompt."""
    siblings: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if np.isfinite(values[index]):
            siblings.setdefault(row["prompt_id"], []).append(index)
    yield from siblings.values()


def _below(
    settings: PairSettings, rows: Sequence[Mapping[str, Any]], values: np.ndarray, better: int, siblings: list[int]
) -> Iterator[_Found]:
    """The pairs of `better` and each sibling that it is set above."""
    others = values[siblings]
    differences = values[better] - others
    wanted = (differences > 0) & (differences >= settings.margin)
    if settings.rule != "difference":
        wanted &= (values[better] > 0) & (others < 0)
    chosen = rows[better]
    for place in np.flatnonzero(wanted):
        worse = siblings[place]
        rejected = rows[worse]
        # The same text on both sides has no gradient under DPO.
        if chosen["completion"] == rejected["completion"]:
            continue
        if chosen["prompt"] != rejected["prompt"]:
            raise DataError(
                f"{chosen['id']} and {rejected['id']}: expected the same prompt (one prompt_id), got two texts"
            )
        yield -float(differences[place]), chosen["id"], rejected["id"], better, worse


def _pair(rows: Sequence[Mapping[str, Any]], values: np.ndarray, better: int, worse: int) -> dict[str, Any]:
    chosen, rejected = rows[better], rows[worse]
    return {
        "prompt_id": chosen["prompt_id"],
        "prompt": chosen["prompt"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "chosen_id": chosen["id"],
        "rejected_id": rejected["id"],
        "chosen_value": float(values[better]),
        "rejected_value": float(values[worse]),
        # What the teacher wrote, token for token; where that is unknown, whether it ended its text there itself.
        "chosen_ids": chosen.get("completion_ids"),
        "rejected_ids": rejected.get("completion_ids"),
        "chosen_ends": bool(chosen.get("ends", False)),
        "rejected_ends": bool(rejected.get("ends", False)),
    }


def _difference(pair: Mapping[str, Any]) -> float:
    return pair["chosen_value"] - pair["rejected_value"]


def _signs(values: np.ndarray) -> dict[str, int]:
    finite = values[np.isfinite(values)]
    return {"positive": int((finite > 0).sum()), "negative": int((finite < 0).sum()), "zero": int((finite == 0).sum())}


def _no_pairs(settings: PairSettings, rows: Sequence[Mapping[str, Any]], signal: Signal) -> str:
    """Why no pair came out, and what to change."""
    values = signal.centred if settings.rule == "centred" else signal.values
    finite = values[np.isfinite(values)]
    counts = f"pairs: none from {len(finite)} of {len(rows)} rows that have a value"
    if all(len(siblings) < 2 for siblings in _by_prompt(rows, values)):
        unvalued = "use another judge, or " if signal.name == "judge" else "raise score.max_length, or "
        missing = unvalued if len(finite) < len(rows) else ""
        return f"{counts}: no prompt has two candidates with a value: {missing}sample more per prompt, filter less"
    if finite.min() == finite.max():
        return f"{counts}: all values are the same: use another signal, or another judge"
    signs = _signs(values)
    if settings.rule == "sign" and 0 in (signs["positive"], signs["negative"]):
        sign = "negative" if signs["negative"] else "positive"
        return f"{counts}: no two signs, all are {sign} (a drift that all candidates share): set pairs.rule=centred"
    changes = ["lower pairs.margin"] if settings.margin else []
    changes += ["set pairs.rule=difference"] if settings.rule != "difference" else []
    return (
        f"{counts} by rule {settings.rule!r} with margin {settings.margin:g} ({signs['positive']} positive, "
        f"{signs['negative']} negative): {', or '.join(changes) or 'siblings have equal values or texts: sample more'}"
    )
