"""What surrounds the sections of benchmarks.gpu; the sections themselves run in tests/on_pretended_gpu.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[1]
# A machine with torch, triton, transformers, pyarrow and rich, and this package in a folder.
BARE = """
import importlib.metadata, sys

MISSING = {"accelerate", "bitsandbytes", "datasets", "matplotlib", "pandas", "peft", "pydantic", "rapidfuzz", "trl",
           "vllm"}

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

sys.meta_path = [Finder(finder) for finder in sys.meta_path]
of_installed = importlib.metadata.Distribution.from_name

def from_name(name):
    if name in MISSING | {"montessori"}:
        raise importlib.metadata.PackageNotFoundError(name)
    return of_installed(name)

importlib.metadata.Distribution.from_name = from_name
sys.path.insert(0, "tests")
"""
SCORED = """
from support import make_model, make_rows, warm_optimizer
from benchmarks import gpu, gpu_sections
from benchmarks.common import machine
from montessori import InfluenceEstimator

assert machine()["versions"]["montessori"] == "none"
model = make_model("llama_tied")
estimator = InfluenceEstimator(model, warm_optimizer(model), make_rows(2, seed=1), pilot=1)
print(estimator.audit(make_rows(3, seed=2), k=3).agreement)
"""


def test_it_needs_no_other_package_than_it_says():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BARE + SCORED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", f"exit status {-signal.SIGSEGV}"),
        ("raise SystemExit('wrong results')", "wrong results"),
        ("import sys; print('only here'); sys.exit(3)", "only here"),
    ],
    ids=["signal", "stderr", "stdout"],
)
def test_a_section_that_ends_in_any_way_has_an_error(program, error):
    outcome = gpu.run([sys.executable, "-c", program], 60)
    assert gpu.last_line(outcome) == error


def test_what_a_section_has_started_ends_with_it(tmp_path):
    number = tmp_path / "pid"
    outcome = gpu.run(["bash", "-c", f"sleep 600 & echo $! > {number}; wait"], 2)
    assert outcome["error"] == "took more than 2 s"
    child = int(number.read_text(encoding="utf-8"))
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        # Whoever adopts it may take a while to bury it.
        if not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} outlived its section")


def test_what_is_measured_is_kept_when_the_rest_is_cut_off(tmp_path, monkeypatch):
    def section(name: str, limit_s: int) -> dict:
        if name == "fidelity":
            raise KeyboardInterrupt
        return {"seconds": 1.0, "result": {"rows": []}}

    monkeypatch.setattr(gpu, "build", lambda: {"seconds": 1.0})
    monkeypatch.setattr(gpu, "run_section", section)
    path = tmp_path / "results" / "gpu_card.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.measure({"sections": {}}, path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert {"build", "ceilings", "checks triton"} <= kept["sections"].keys()


def test_the_sanitizer_gets_the_time_that_is_left(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "build", lambda: {"seconds": 1.0})
    monkeypatch.setattr(gpu, "run_section", lambda name, limit_s: {"seconds": 1.0, "error": "no device"})
    monkeypatch.setattr(gpu, "SANITIZED_LIMIT_S", 100)
    monkeypatch.setattr(gpu, "sanitize", lambda kind, name, limit_s: asked.append(limit_s) or {"seconds": 1.0})
    record = {"sections": {}, "sanitizer": {}}
    gpu.measure(record, tmp_path / "gpu_card.json")
    assert len(asked) == len(record["sanitizer"]) == len(gpu.SANITIZER_TOOLS) * 4
    assert all(0 < limit_s <= 100 for limit_s in asked)
