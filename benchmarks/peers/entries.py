"""The peers, and how one is run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A peer: module and class under `benchmarks.peers`, its distribution, and what its scores are.

    `core`: it stands for the others of its kind where time is short. A formula of a few lines is no library.
    """

    peer: str
    package: str | None
    score: str
    core: bool = False


REAL = "real step"
ENTRIES = {
    REAL: Entry("montessori_peer:RealStep", None, "loss before − after one real step", core=True),
    "montessori": Entry("montessori_peer:Montessori", "montessori", "exact Adam, anchored", core=True),
    "montessori, first order": Entry("montessori_peer:FirstOrder", "montessori", "exact Adam"),
    "montessori, block linears": Entry("montessori_peer:BlockLinears", "montessori", "exact Adam"),
    "dattri-llm, Adam": Entry("dattri:ExactAdam", "dattri-llm", "exact Adam", core=True),
    "dattri-llm, raw": Entry("dattri:RawDot", "dattri-llm", "gradient dot product"),
    "bergson, Adam": Entry("bergson_peer:FrozenAdam", "bergson", "gradient / frozen √v, dot product", core=True),
    "bergson, raw": Entry("bergson_peer:RawDot", "bergson", "gradient dot product"),
    "kronfluence, identity": Entry("kronfluence_peer:RawDot", "kronfluence", "gradient dot product"),
    "Opacus + Adam in torch": Entry("opacus_peer:ExactAdam", "opacus", "exact Adam", core=True),
    "torch.func.vmap + Adam": Entry("vmap:ExactAdam", "torch", "exact Adam"),
    "LESS-style, one by one": Entry("less:AdamDot", "torch", "Adam without bias correction"),
}


def run_peer(entry: Entry, task: Path, threads: int, limit: int, extra: Sequence[str]) -> dict[str, Any]:
    """Result of the worker process, or the reason why there is none."""
    out = task.with_name("result.json")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.peers.worker", "--task", str(task), "--out", str(out)]
    command += ["--peer", entry.peer, "--threads", str(threads), *extra]
    command += ["--package", entry.package] if entry.package else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit} s"}
    if done.returncode or not out.exists():
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(out.read_text(encoding="utf-8"))
