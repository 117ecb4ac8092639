"""montessori and its peers on the same candidates: time, memory, and agreement with real optimizer steps.

    python -m benchmarks.peers --candidates seed_tasks_175.jsonl --reference reference_256.jsonl
    ... --model tiny --scored 16 --num-references 8

Each peer runs in a process of its own. Times are ratios to plain forward + backward in the same process, pair by pair;
memory is the peak resident size above that of the plain pass. A peer that cannot run keeps its row, with the reason.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, machine, parser, settings_of, write_result
from benchmarks.peers.entries import ENTRIES, REAL, run_peer
from benchmarks.peers.task import save
from benchmarks.students import add_model_options, examples_of, student_checkpoint
from montessori.agreement import Agreement

# Beside the examples: threads, and what the student was warmed up by; rows of the candidates' file beyond the first
# `num_candidates` are its data.
DECIDING = ("threads", "candidates", "num_candidates", "warmup_batch_size", "warmup_max_grad_norm")


def last_results(arguments: argparse.Namespace, examples: str) -> dict[str, dict[str, Any]]:
    """Rows of the last run on this model, if it had the same examples, batches and threads: what others are compared
    with."""
    path = RESULTS / f"peers_{arguments.model}.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    now = settings_of(arguments)
    if record.get("examples") != examples or any(record["settings"].get(name) != now[name] for name in DECIDING):
        print("rows of the last run are not kept: it had other examples or settings", flush=True)
        return {}
    return {row.pop("name"): row for row in record["peers"]}


def add_agreement(results: dict[str, dict[str, Any]]) -> None:
    """Put each peer's agreement with the real steps beside its scores."""
    real = results.get(REAL, {})
    if "scores" not in real:
        return
    truth = np.array(real["scores"])
    for name, result in results.items():
        if name != REAL and "scores" in result:
            agreement = Agreement.of(np.array(result["scores"]), truth).to_dict()
            if not result["same_units"]:
                del agreement["median_relative_error"], agreement["max_relative_error"]
            result["agreement"] = agreement


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_model_options(options, scored=8, references=4)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--limit", type=int, default=600, help="seconds that one peer may take")
    some = options.add_mutually_exclusive_group()
    some.add_argument("--only", nargs="+", choices=list(ENTRIES), help="run these, keep the other rows of the last run")
    some.add_argument("--core", action="store_true", help="run one entry of each kind, keep the rows of the others")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    candidates, references, rest = examples_of(arguments)
    task = arguments.work / f"peers_{arguments.model}" / "task.json"
    examples = save(task, student_checkpoint(arguments, rest), candidates, references, arguments.batch_size)
    extra = ["--repeats", str(arguments.repeats)]
    core = [name for name, entry in ENTRIES.items() if entry.core]
    wanted = {name: ENTRIES[name] for name in arguments.only or (core if arguments.core else ENTRIES)}
    results = last_results(arguments, examples) if len(wanted) < len(ENTRIES) else {}
    for name, entry in wanted.items():
        outcome = run_peer(entry, task, arguments.threads, arguments.limit, extra)
        results[name] = {"score": entry.score, "machine": machine(), **outcome}
        print(f"{name}: {results[name].get('error', 'ok')}", flush=True)
    results = {name: results[name] for name in ENTRIES if name in results}
    add_agreement(results)
    del arguments.only, arguments.core
    peers = [{"name": name, **result} for name, result in results.items()]
    machines = [result["machine"] for result in results.values()]
    content = {"peers": peers, "examples": examples, "machines": machines}
    path = write_result(f"peers_{arguments.model}", arguments, content)
    show(results)
    print(f"wrote {path}")


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="ratio of time to plain forward + backward")
    for column in ("", "time", "extra peak memory, GB", "covered", "Pearson", "Spearman", "sign"):
        table.add_column(column)
    for name, result in results.items():
        if "error" in result:
            table.add_row(name, result["error"])
            continue
        ratio = np.median(np.divide(result["seconds"]["score"], result["seconds"]["plain"]))
        extra = (result["peak_rss_bytes"]["score"] - result["peak_rss_bytes"]["plain"]) / 1e9
        covered = 1 - sum(result["left_out"].values()) / result["trainable"]
        agreement = result.get("agreement", {})
        figures = [f"{agreement[key]:.4f}" if key in agreement else "" for key in ("pearson", "spearman")]
        sign = f"{agreement['sign_agreement']:.0%}" if agreement else ""
        table.add_row(name, f"{ratio:.2f}", f"{extra:.2f}", f"{covered:.0%}", *figures, sign)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
