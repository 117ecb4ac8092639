"""What surrounds the sections of benchmarks.gpu; they themselves run in tests/sections_on_pretended_gpu.py."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_sections import SECTIONS, in_processes, passed
from montessori.errors import ResourceError

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
    outcome = gpu.run([sys.executable, "-c", program], 60).outcome()
    assert gpu.last_line(outcome) == error


def test_an_error_has_both_ends_of_what_was_said():
    program = "import sys; print('first' + 'x' * 9999 + 'last'); sys.exit('reason' + 'y' * 9999 + 'end')"
    error = gpu.run([sys.executable, "-c", program], 60).outcome()["error"]
    assert all(part in error for part in ("first", "last", "reason", "end"))
    assert len(error) < 4 * gpu.KEPT + 100


def test_what_a_section_has_started_ends_with_it(tmp_path):
    number = tmp_path / "pid"
    ended = gpu.run(["bash", "-c", f"echo begun; sleep 600 & echo $! > {number}; wait"], 2)
    assert ended.outcome()["error"] == "begun\ntook more than 2 s"
    child = int(number.read_text(encoding="utf-8"))
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        # Whoever adopts it may take a while to bury it.
        if not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} outlived its section")


@pytest.mark.parametrize(
    ("output", "outcome"),
    [
        ('{"rows": []}\na library takes leave', {"seconds": 1.0, "result": {"rows": []}}),
        ("", {"seconds": 1.0, "error": "it told no result"}),
        ('{"rows": [', {"seconds": 1.0, "error": '{"rows": [\nit told no result'}),
    ],
)
def test_a_section_without_a_result_does_not_end_the_others(output, outcome, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda *arguments: gpu.Ended(1.0, output, "", None))
    assert gpu.run_section("ceilings", 60) == outcome


def test_the_sanitizer_s_findings_are_kept(monkeypatch):
    said = "========= Invalid read\n" * 100 + "noise\n========= ERROR SUMMARY: 100 errors"
    monkeypatch.setattr(gpu, "run", lambda *arguments: gpu.Ended(1.0, said, "", "exit status 9"))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: sys.executable)
    outcome = gpu.sanitize("memcheck", "checks mma", 60)
    assert outcome["findings"] == ["========= Invalid read"] * gpu.MOST_FINDINGS
    assert outcome["summary"] == ["========= ERROR SUMMARY: 100 errors"]
    assert gpu.last_line(outcome) == "========= ERROR SUMMARY: 100 errors"


def test_a_build_that_leaves_no_library_says_what_the_compiler_said(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "run", lambda *arguments: gpu.Ended(1.0, "", "nvcc: no such file", None))
    assert gpu.build()["error"] == "nvcc: no such file\n_cuda.so was not built"


@pytest.fixture
def sections(monkeypatch):
    """Errors of sections by name; the others went well. Nothing is kept as measured."""
    errors: dict[str, str] = {}

    def section(name: str, limit_s: int) -> dict:
        assert limit_s > 0
        return {"seconds": 1.0} | ({"error": errors[name]} if name in errors else {"result": {"rows": [name]}})

    monkeypatch.setattr(gpu, "build", lambda: {"seconds": 1.0})
    monkeypatch.setattr(gpu, "run_section", section)
    monkeypatch.setattr(gpu.calibration, "keep", lambda timed, failed: {"timed": sorted(timed), "failed": failed})
    monkeypatch.setattr(
        gpu, "sanitize", lambda kind, name, limit_s: {"seconds": 1.0} if limit_s > 0 else pytest.fail("no time")
    )
    return errors


def measured(path: Path) -> dict:
    record = {"sections": {}, "sanitizer": {}}
    gpu.measure(record, path / "gpu_card.json")
    return record


def test_what_needs_a_section_that_failed_is_left_out(sections, tmp_path):
    wrong = "wrong results in 1 of 2 cases, such as []"
    sections |= {"checks mma": f"a warning\n{wrong}", "checks wgmma": "took more than 40 s", "checks triton": "boom"}
    record = measured(tmp_path)
    for name in ("linear mma", "linear wgmma", "linear triton", "score triton"):
        assert record["sections"][name]["error"].startswith("left out: checks")
    assert "result" in record["sections"]["linear wgmma_cluster"]
    # An error that says nothing of the kernel is not kept as the kernel's, nor is too little time for its times.
    sections |= {"linear wgmma_cluster": wrong, "linear triton": "took more than 40 s"}
    sections.pop("checks triton")
    assert measured(tmp_path)["calibration"]["failed"] == {
        "mma": wrong,
        "wgmma": "took more than 40 s",
        "wgmma_cluster": wrong,
    }
    assert record["calibration"] == {
        "timed": ["wgmma_cluster"],
        "failed": {"mma": wrong, "wgmma": "took more than 40 s"},
    }
    assert record["sanitizer"]["memcheck: checks mma"] == {"seconds": 1.0}
    assert record["sanitizer"]["racecheck: checks wgmma"]["error"] == "left out: checks wgmma hung"


@pytest.mark.parametrize(
    "failing", [(), ("checks triton", *(f"checks {name}" for name in gpu.calibration.HOPPER_KERNELS))]
)
def test_a_choice_that_cannot_be_kept_does_not_end_the_sections(failing, sections, tmp_path, monkeypatch):
    def refuse(timed, failed):
        raise ResourceError("kernels.json: cannot be written")

    monkeypatch.setattr(gpu.calibration, "keep", refuse)
    sections |= dict.fromkeys(failing, "wrong results")
    record = measured(tmp_path)
    assert record["calibration"]["error"] in ("kernels.json: cannot be written", "no kernel gave right results")
    assert "result" in record["sections"]["head"]


def test_what_is_written_by_hand_is_sanitized_first():
    assert [name for _, name in gpu.sanitized()][-3:] == ["checks triton"] * 3
    assert len(set(gpu.sanitized())) == 3 * (len(gpu.calibration.HOPPER_KERNELS) + 1)


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if section.needs])
def test_what_a_section_needs_comes_before_it(name):
    assert [*SECTIONS].index(SECTIONS[name].needs) < [*SECTIONS].index(name)


def test_what_is_measured_is_kept_when_the_rest_is_cut_off(sections, tmp_path, monkeypatch):
    run_section = gpu.run_section

    def section(name: str, limit_s: int) -> dict:
        if name == "fidelity":
            raise KeyboardInterrupt
        return run_section(name, limit_s)

    monkeypatch.setattr(gpu, "run_section", section)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    kept = json.loads((tmp_path / "gpu_card.json").read_text(encoding="utf-8"))
    assert {"build", "ceilings", "checks triton"} <= kept["sections"].keys()


def test_what_comes_after_the_time_is_left_out(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TOTAL_LIMIT_S", 0)
    monkeypatch.setattr(gpu, "SANITIZED_LIMIT_S", 30)
    asked = []
    monkeypatch.setattr(gpu, "sanitize", lambda kind, name, limit_s: asked.append(limit_s) or {"seconds": 1.0})
    record = measured(tmp_path)
    errors = {outcome.get("error") for name, outcome in record["sections"].items() if name != "build"}
    assert errors >= {gpu.NO_TIME}
    assert len(asked) == len(record["sanitizer"]) == len(gpu.SANITIZER_TOOLS) * 4
    assert all(0 < limit_s <= 30 for limit_s in asked)


def a_row(right: bool) -> list[dict]:
    return [{"right": right, "process": os.getpid()}]


def test_parts_of_a_check_run_in_processes_of_their_own():
    parts = {str(right): partial(a_row, right) for right in (True, False)}
    rows = in_processes(parts)
    assert [row["right"] for row in rows] == [True, False]
    assert os.getpid() not in {row["process"] for row in rows}
    with pytest.raises(SystemExit, match="wrong results in 1 of 2 cases"):
        passed(rows)


def test_the_part_that_fails_is_named(capfd):
    with pytest.raises(ValueError, match="math domain error"):
        in_processes({"good": partial(a_row, True), "bad": partial(math.sqrt, -1.0)})
    assert "failed: bad" in capfd.readouterr().err
