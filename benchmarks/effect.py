"""Whether tuning the teacher helps: tuned against untuned teachers (Self-Instruct), over several seeds.

    python -m benchmarks.effect --preset small --seeds 1 2 3 \\
        --set data.seeds=seed_tasks_175.jsonl --set data.reference=reference_256.jsonl

Two runs for each seed, alike but for `teacher_mode`, in directories of their own below `--work`: a finished one is only
read, an interrupted one goes on. A variation of a preset takes a `--name`. Compared are the real influence of rows of
both teachers (method "exact", measured within the tuned run: fresh ones of the tuned teacher, of the untuned one some
of the candidates) and the held-out loss of the student of each, row by row. Each seed leaves a JSON file of its own, so
seeds can come from different machines; `benchmarks.results` pools those that are there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import combine_pvalues

from benchmarks.common import write_result
from montessori.loop.commands import carry_out
from montessori.loop.config import PRESETS, read_config
from montessori.loop.evaluate import EVALUATION_FILE
from montessori.loop.pairs import SUMMARY_FILE
from montessori.loop.rundir import RunDirectory
from montessori.loop.statistics import bootstrap_mean, tail_probability

MODES = ("tuned", "untuned")


def seed_result(tuned: Path, untuned: Path) -> dict[str, Any]:
    """What the last round of a tuned and of an untuned run say, of one seed."""
    evaluated, plain = (_evaluation(path) for path in (tuned, untuned))
    influence = evaluated["influence"]
    losses = [np.array(found["held_out"]["models"]["student"]["rows"]) for found in (evaluated, plain)]
    base = np.array(evaluated["held_out"]["models"]["base"]["rows"])
    costs = RunDirectory(tuned).costs()
    pairs = json.loads((_last_round(tuned) / "pairs" / SUMMARY_FILE).read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (_last_round(tuned) / "tune/metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "influence": {name: _finite(influence[name]["influence"]) for name in MODES},
        "difference": influence["comparison"]["difference"]["mean"],
        "p": influence["comparison"]["p"],
        "held_out": {"tuned": losses[0].tolist(), "untuned": losses[1].tolist(), "base": base.tolist()},
        "num_pairs": pairs["num_pairs"],
        "validation_accuracy": next((s["eval_rewards/accuracies"] for s in reversed(steps) if _validated(s)), None),
        "seconds": {stage: cost["seconds"] for stage, cost in costs.items()},
    }


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all seeds: difference of mean influence, its p by Stouffer's method, and the loss below Self-Instruct's.

    The interval of the difference resamples within seed and teacher; that of the loss resamples held-out rows, each
    with its mean over the seeds.
    """
    rng = np.random.default_rng(0)
    arms = [[np.array(found["influence"][mode]) for mode in MODES] for found in seeds]
    resampled = [
        np.mean([rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for a, b in arms]) for _ in range(10_000)
    ]
    tail = tail_probability([sample for arm in arms for sample in arm])
    low, high = np.quantile(resampled, [tail, 1 - tail])
    mean = float(np.mean([found["difference"] for found in seeds]))
    below = np.mean([np.subtract(s["held_out"]["untuned"], s["held_out"]["tuned"]) for s in seeds], axis=0)
    return {
        "difference": {"mean": mean, "low": float(low), "high": float(high)},
        "p": float(combine_pvalues([s["p"] for s in seeds], method="stouffer").pvalue),
        "below_self_instruct": bootstrap_mean(below).to_dict(),
        "share_of_scoring": float(np.mean([scoring_share(s["seconds"]) for s in seeds])),
    }


def scoring_share(seconds: dict[str, float]) -> float:
    """Share of the time of a round that its scores take; evaluation is not part of a round."""
    stages = {stage: value for stage, value in seconds.items() if not stage.endswith("/evaluate")}
    return sum(value for stage, value in stages.items() if stage.endswith("/score")) / sum(stages.values())


def _evaluation(path: Path) -> dict[str, Any]:
    return json.loads((_last_round(path) / "evaluate" / EVALUATION_FILE).read_text(encoding="utf-8"))


def _last_round(path: Path) -> Path:
    folders = (folder for folder in path.glob("round_*") if folder.is_dir())
    return max(folders, key=lambda folder: int(folder.name.removeprefix("round_")))


def _finite(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _validated(step: dict[str, Any]) -> bool:
    return "eval_rewards/accuracies" in step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--preset", choices=PRESETS, default="small")
    options.add_argument("--name", help="of the JSON files: effect_NAME_SEED; the preset's unless given")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--work", type=Path, help="directory of the runs; out/effect, with a name out/effect_NAME")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = options.parse_args()
    if arguments.work is None:
        arguments.work = Path("out") / (f"effect_{arguments.name}" if arguments.name else "effect")
    torch.set_num_threads(arguments.threads)
    numbers, found = arguments.seeds, []
    for seed in numbers:
        runs = {mode: arguments.work / f"{mode}_{seed}" for mode in MODES}
        for mode, path in runs.items():
            settings = [*arguments.assignments, f"seed={seed}", f"teacher_mode={mode}"]
            carry_out(read_config(preset=arguments.preset, assignments=settings), path)
        found.append(seed_result(**runs))
        print(f"wrote {write_seed(arguments, seed, found[-1])}")
    show(numbers, found)


def write_seed(arguments: argparse.Namespace, seed: int, found: dict[str, Any]) -> Path:
    """One JSON of one seed; data files go by name, wherever they lie."""
    assignments = [_without_folder(assignment) for assignment in arguments.assignments]
    settings = argparse.Namespace(**{**vars(arguments), "assignments": assignments, "seeds": [seed]})
    return write_result(f"effect_{arguments.name or arguments.preset}_{seed}", settings, found)


def _without_folder(assignment: str) -> str:
    key, _, value = assignment.partition("=")
    return f"{key}={Path(value).name}" if key.startswith("data.") else assignment


def show(numbers: list[int], seeds: list[dict[str, Any]]) -> None:
    table = Table(title="tuned against untuned teacher")
    for column in ("seed", "pairs", "influence, difference", "p", "held-out loss below Self-Instruct's"):
        table.add_column(column)
    for number, found in zip(numbers, seeds, strict=True):
        below = np.mean(np.subtract(found["held_out"]["untuned"], found["held_out"]["tuned"]))
        cells = [f"{found['difference']:+.2e}", f"{found['p']:.2g}", f"{below:+.4f}"]
        table.add_row(str(number), str(found["num_pairs"]), *cells)
    overall = summarise(seeds)
    cells = [f"{overall['difference']['mean']:+.2e}", f"{overall['p']:.2g}"]
    table.add_row("all", "", *cells, f"{overall['below_self_instruct']['mean']:+.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
