"""Builds, checks and times the GPU kernels on the GPU of this machine: one call, a table last, one JSON.

    python -m benchmarks.gpu [--out DIRECTORY] [--sanitize] [--dry-run]

Needs torch, triton, transformers, pyarrow, rich, nvcc and ninja, and no network. Every section runs in a process of its
own with a time limit, so a kernel that hangs or breaks the device costs its own section alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_sections
from benchmarks.common import RESULTS, machine
from montessori import calibration
from montessori.writing import write_json

ROOT = Path(__file__).parents[1]
SANITIZER_TOOLS = ("memcheck", "synccheck", "racecheck")
BUILD_LIMIT_S = 120
SANITIZER_LIMIT_S = 180
# Of the build and all sections together, and with the sanitizer; what comes after it is left out.
TOTAL_LIMIT_S = 450
SANITIZED_LIMIT_S = 570


def build() -> dict[str, Any]:
    """The CUDA library for the capability of this device, put beside the package's sources.

    Built apart from pyproject.toml, whose metadata an older setuptools would refuse.
    """
    major, minor = torch.cuda.get_device_capability()
    archs = f"{major}{minor}a" if major == 9 else f"{major}{minor}"
    environment = os.environ | {"MONTESSORI_CUDA_ARCHS": archs, "MONTESSORI_REQUIRE_KERNELS": "1"}
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(ROOT / "setup.py", place)
        shutil.copytree(ROOT / "csrc", Path(place) / "csrc")
        (Path(place) / "montessori").mkdir()
        outcome = run([sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_LIMIT_S, environment, Path(place))
        for library in (Path(place) / "montessori").glob("*.so"):
            shutil.copy(library, ROOT / "montessori")
    del outcome["output"]
    return outcome


def run(
    command: list[str], limit_s: int, environment: dict[str, str] | None = None, place: Path = ROOT
) -> dict[str, Any]:
    """Outcome of a child process: seconds, and the error with the end of its output if it failed."""
    start = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Sections run by what others have measured, and do not measure themselves.
    environment = (environment or dict(os.environ)) | {"PYTHONPATH": path, "MONTESSORI_CALIBRATE": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes) as child:
        try:
            output, errors = child.communicate(timeout=limit_s)
        except BaseException as error:
            # What it has started too: compilers, and the program that a sanitizer runs, would keep the device.
            os.killpg(child.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"seconds": time.perf_counter() - start, "error": f"took more than {limit_s} s", "output": ""}
    outcome: dict[str, Any] = {"seconds": time.perf_counter() - start, "output": output}
    if child.returncode:
        outcome["error"] = (errors or output)[-3000:].strip() or f"exit status {child.returncode}"
    return outcome


def run_section(name: str, limit_s: int) -> dict[str, Any]:
    """Result of one section, or its error."""
    if limit_s <= 0:
        return {"seconds": 0.0, "error": "no time left"}
    outcome = run([sys.executable, "-m", "benchmarks.gpu", "--section", name], limit_s)
    output = outcome.pop("output")
    if "error" not in outcome:
        outcome["result"] = json.loads(output.splitlines()[-1])
    return outcome


def calibrate(sections: dict[str, Any]) -> dict[str, Any]:
    """Keep for "auto" which of the kernels that were right is fastest; the sections after it use that."""
    timed, failed = {}, {}
    for name in ("triton", *calibration.HOPPER_KERNELS):
        outcomes = [sections[f"{what} {name}"] for what in ("checks", "linear")]
        errors = [last_line(outcome) for outcome in outcomes if "error" in outcome]
        if errors:
            failed[name] = errors[0]
        else:
            timed[name] = outcomes[-1]["result"]["rows"]
    return calibration.keep(timed, failed) if timed else {"error": "no kernel gave right results", "failed": failed}


def sanitize(kind: str, name: str, limit_s: int) -> dict[str, Any]:
    """The checks of one kernel under one of compute-sanitizer's tools, at their own small shapes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists() or limit_s <= 0:
        return {"seconds": 0.0, "error": "no time left" if limit_s <= 0 else "no compute-sanitizer"}
    command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu"]
    # Torch hands out pieces of large allocations, where what is written past the end of one hits the next unseen.
    outcome = run([*command, "--section", name], limit_s, os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return outcome | {"summary": [line for line in outcome.pop("output").splitlines() if "SUMMARY" in line]}


def print_table(record: dict[str, Any]) -> None:
    """A line per section, then the ratios that matter."""
    for name, outcome in record["sections"].items():
        print(f"{name:24} {outcome['seconds']:7.1f} s  {last_line(outcome)[:90]}")
    print(f"fastest: {record['calibration'].get('ranking', record['calibration'])}")
    for name, outcome in record["sections"].items():
        for row in [] if name.startswith("checks") else outcome.get("result", {}).get("rows", []):
            print(f"{name:24} " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()))


def last_line(outcome: dict[str, Any]) -> str:
    return outcome.get("error", "ok").splitlines()[-1]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=RESULTS, help="directory of the JSON")
    options.add_argument("--section", choices=sorted(gpu_sections.SECTIONS), help="run one section in this process")
    options.add_argument("--sanitize", action="store_true", help="also run the checks under compute-sanitizer")
    options.add_argument("--dry-run", action="store_true", help="list the sections and stop")
    arguments = options.parse_args()
    if arguments.dry_run:
        for name, section in gpu_sections.SECTIONS.items():
            print(f"{name:24} at most {section.limit_s:4} s  {section.work.__doc__.splitlines()[0]}")
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: expected a CUDA device, torch finds none; --dry-run lists what would run")
    if arguments.section:
        print(json.dumps(gpu_sections.SECTIONS[arguments.section].work()))
        return
    device = gpu_sections.describe_device()
    path = arguments.out / f"gpu_{device['name'].lower().replace(' ', '_')}.json"
    record = {"device": device, "machine": machine(), "sections": {}} | (
        {"sanitizer": {}} if arguments.sanitize else {}
    )
    measure(record, path)
    print_table(record)
    print(f"wrote {path}")


def measure(record: dict[str, Any], path: Path) -> None:
    """Fill the record, and the file after every step: whoever ends this in the middle keeps what is done."""
    start = time.perf_counter()

    def left(limit_s: int) -> int:
        return int(limit_s - (time.perf_counter() - start))

    def keep(part: str, name: str, outcome: dict[str, Any]) -> None:
        record[part][name] = outcome
        write_json(path, record)
        print(f"{name}: {last_line(outcome)}", flush=True)

    keep("sections", "build", build())
    for name, section in gpu_sections.SECTIONS.items():
        if name == gpu_sections.FIRST_SCORED:
            record["calibration"] = calibrate(record["sections"])
        keep("sections", name, run_section(name, min(section.limit_s, left(TOTAL_LIMIT_S))))
    for kind in SANITIZER_TOOLS if "sanitizer" in record else ():
        for kernel in ("triton", *calibration.HOPPER_KERNELS):
            limit_s = min(SANITIZER_LIMIT_S, left(SANITIZED_LIMIT_S))
            keep("sanitizer", f"{kind}: checks {kernel}", sanitize(kind, f"checks {kernel}", limit_s))


if __name__ == "__main__":
    main()
