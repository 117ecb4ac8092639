"""What every benchmark needs: the warmed-up student, the data, and a JSON file with the machine in it."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from montessori.batching import Example, make_batches
from montessori.data import Rows, load_rows
from montessori.demo import demo_file
from montessori.encoding import encode_rows
from montessori.errors import MontessoriError
from montessori.models import load_model
from montessori.runs import versions
from montessori.warmup import warmup

RESULTS = Path(__file__).parent / "results"
MAX_LENGTH = 1024
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share; without files, the packaged pairs are used."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--candidates", default=str(demo_file("candidates.jsonl")))
    options.add_argument("--reference", default=str(demo_file("reference.jsonl")))
    options.add_argument("--num-candidates", type=int, default=32)
    options.add_argument("--num-references", type=int, default=8)
    options.add_argument("--work", type=Path, default=Path("out/bench"), help="where the warmed-up student is kept")
    options.add_argument("--warmup-batch-size", type=int, default=8)
    options.add_argument("--warmup-max-grad-norm", type=float, help="clip the warm-up (candidates are not clipped)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    return options


def warm_student(candidates: Rows, arguments: argparse.Namespace) -> Path:
    """Checkpoint of SmolLM2-135M after 12 AdamW steps, with lr rising towards 5e-6, on rows that are not scored."""
    model, tokenizer = load_model("smollm2-135m")
    rows = Rows(
        list(candidates)[arguments.num_candidates :] or load_rows(demo_file("warmup.jsonl")).rows, candidates.source
    )
    examples = encode_rows(rows, tokenizer, max_length=MAX_LENGTH, truncation="right").examples
    out = arguments.work / f"warmup{warmup_name(arguments)}"
    return warmup(
        model,
        tokenizer,
        examples,
        out,
        max_steps=12,
        batch_size=arguments.warmup_batch_size,
        per_device_train_batch_size=4,
        max_grad_norm=arguments.warmup_max_grad_norm,
    )


def warmup_name(arguments: argparse.Namespace) -> str:
    """Suffix of files that belong to this warm-up."""
    clipped = "_clipped" if arguments.warmup_max_grad_norm else ""
    return f"_{arguments.warmup_batch_size}{clipped}"


def load_data(arguments: argparse.Namespace) -> tuple[Rows, Rows, Rows]:
    """All candidate rows, the scored ones, and the reference rows."""
    try:
        everything, reference = load_rows(arguments.candidates), load_rows(arguments.reference)
    except MontessoriError as error:
        raise SystemExit(f"error: {error}") from error
    scored = Rows(list(everything)[: arguments.num_candidates], everything.source)
    return everything, scored, Rows(list(reference)[: arguments.num_references], reference.source)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reset_peak() -> None:
    """Forget the peak resident size so far (Linux: 5 resets VmHWM)."""
    gc.collect()
    CLEAR.write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Peak resident size since `reset_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))[1]) * 1024


def interleaved(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm, one of each in turn; the first round, cold, is left out."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for name, work in list(arms.items()) * (repeats + 1):
        times[name].append(seconds(work))
    return {name: values[1:] for name, values in times.items()}


def ratios(times: dict[str, list[float]], of: str, to: str) -> dict[str, float]:
    """Speed of `of` relative to `to`, pair by pair: median and range."""
    values = [b / a for a, b in zip(times[of], times[to], strict=True)]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def spread_batches(rows: Rows, tokenizer: Any, arguments: argparse.Namespace) -> tuple[Rows, list[list[Example]]]:
    """Full batches from the middle of each stretch of lengths, and the rows in them."""

    def batched(some: Rows) -> list[list[Example]]:
        examples = encode_rows(some, tokenizer, max_length=MAX_LENGTH, truncation="right").examples
        return make_batches(examples, arguments.batch_tokens)

    every = batched(rows)
    chosen = [every[(2 * i + 1) * len(every) // (2 * arguments.batches)] for i in range(arguments.batches)]
    kept = Rows([list(rows)[example.index] for batch in chosen for example in batch], rows.source)
    return kept, batched(kept)


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    matrices = {"amx": True} if has_amx() else {}
    return {"cpu": cpu, **matrices, "threads": torch.get_num_threads(), "versions": versions()}


def has_amx() -> bool:
    """Whether this processor has matrix registers: results that depend on them have files of their own."""
    return any(line.startswith("flags") and "amx_bf16" in line for line in _cpuinfo())


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options as they stand in a result: files by their names."""
    files = ("candidates", "reference", "work")
    return {name: Path(value).name if name in files else value for name, value in vars(arguments).items()}


def write_result(name: str, arguments: argparse.Namespace, content: dict[str, Any]) -> Path:
    """One JSON under benchmarks/results with settings and machine beside the numbers."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"date": date.today().isoformat(), "settings": settings_of(arguments), "machine": machine()}
    record = {**made, **content}
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
