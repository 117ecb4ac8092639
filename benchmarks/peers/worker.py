"""One peer in a process of its own: time against plain forward + backward in the same process, and peak memory.

Started by `python -m benchmarks.peers`; writes a JSON file.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import peak_bytes, reset_peak, seconds
from benchmarks.peers.task import Peer, Task, batch_losses


def plain_pass(model: nn.Module, task: Task, over_references: bool) -> None:
    """What training does without its optimizer step: all weight gradients of the padded batches."""
    for batch in task.batches(task.candidates) + (task.batches(task.references) if over_references else []):
        batch_losses(model, batch).sum().backward()
        model.zero_grad()


def left_out(sizes: dict[str, int], covered: set[str]) -> dict[str, int]:
    """Trainable scalars without a part in the score, by kind."""
    counted: Counter[str] = Counter()
    for name in sizes.keys() - covered:
        kind = "norms" if "norm" in name else "embedding and head" if "embed" in name or "head" in name else "others"
        counted[kind] += sizes[name]
    return dict(counted)


def measure(task: Task, make_peer: Callable[[Task], Peer], repeats: int) -> dict[str, Any]:
    """Times in pairs, peaks and scores; the first pair, cold, stands apart."""
    sizes = {name: parameter.numel() for name, parameter in task.trainable.items()}
    # Peers wrap, patch and freeze their model; the yardstick keeps one that they do not touch.
    plain_model = copy.deepcopy(task.model)
    peer = make_peer(task)
    unknown = peer.covered - sizes.keys()
    if unknown:
        raise ValueError(f"covered: {sorted(unknown)[0]} is no parameter of the model")

    scores: list[float] = []

    def plain() -> None:
        plain_pass(plain_model, task, peer.over_references)

    def score() -> None:
        scores[:] = peer.score().tolist()

    reset_peak()
    plain()
    peaks = {"plain": peak_bytes()}
    reset_peak()
    times: dict[str, Any] = {"prepare": seconds(peer.prepare), "cold": seconds(score)}
    peaks["score"] = peak_bytes()
    times |= {"plain": [], "score": []}
    for _ in range(repeats):
        times["plain"].append(seconds(plain))
        times["score"].append(seconds(score))
    return {
        "scores": scores,
        "seconds": times,
        "peak_rss_bytes": peaks,
        "over_references": peer.over_references,
        "same_units": peer.same_units,
        "trainable": sum(sizes.values()),
        "left_out": left_out(sizes, peer.covered),
    }


def measure_memory(task: Task, make_peer: Callable[[Task], Peer], batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Peaks per number of examples in a batch, smallest first; preparation is left out."""
    plain_model = copy.deepcopy(task.model)
    peer = make_peer(task)
    peer.prepare()
    peaks = []
    for size in sorted(batch_sizes):
        task.batch_size = size
        reset_peak()
        plain_pass(plain_model, task, peer.over_references)
        plain = peak_bytes()
        reset_peak()
        peer.score()
        peaks.append({"batch_size": size, "plain": plain, "score": peak_bytes()})
    return {"peaks": peaks}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--task", type=Path, required=True)
    options.add_argument("--peer", required=True, help="module:class of benchmarks.peers")
    options.add_argument("--package", help="distribution whose version is recorded")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--memory", type=int, nargs="+", help="peaks at these batch sizes instead of times")
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    module, name = arguments.peer.split(":")
    make_peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)
    task = Task.load(arguments.task)
    if arguments.memory:
        result = measure_memory(task, make_peer, arguments.memory)
    else:
        result = measure(task, make_peer, arguments.repeats)
    if arguments.package:
        result["version"] = version(arguments.package)
    arguments.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
