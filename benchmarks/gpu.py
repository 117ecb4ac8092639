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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_sections
from benchmarks.common import RESULTS, machine
from montessori import calibration, cuda
from montessori.errors import MontessoriError
from montessori.writing import write_json

ROOT = Path(__file__).parents[1]
SANITIZER_TOOLS = ("memcheck", "synccheck", "racecheck")
BUILD_LIMIT_S = 120
SANITIZER_LIMIT_S = 45
# Of the build and all sections together, and with the sanitizer; what comes after it is left out.
TOTAL_LIMIT_S = 450
SANITIZED_LIMIT_S = 570
KEPT = 1500  # characters of either end of what a process says
MOST_FINDINGS = 60
TOOK_LONGER, WRONG, NO_TIME = "took more than", "wrong results", "no time left"


@dataclass(frozen=True)
class Ended:
    """A child process that has ended, or was ended after its time."""

    seconds: float
    output: str
    errors: str
    failure: str | None  # None where it went well

    def outcome(self) -> dict[str, Any]:
        """For the JSON: the seconds, and the error last after what it said, if it failed."""
        if self.failure is None:
            return {"seconds": self.seconds}
        said = [ends(text) for text in (self.output, self.errors) if text.strip()]
        # An exit status says less than what stands before it.
        plain = said and self.failure.startswith("exit status")
        return {"seconds": self.seconds, "error": "\n".join(said if plain else [*said, self.failure])}


def ends(text: str) -> str:
    """The beginning and the end of what a process has said."""
    text = text.strip()
    return text if len(text) <= 2 * KEPT else f"{text[:KEPT]}\n[...]\n{text[-KEPT:]}"


def run(command: list[str], limit_s: int, environment: dict[str, str] | None = None, place: Path = ROOT) -> Ended:
    """Run a child process, and end all that it has started after `limit_s` seconds."""
    start = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Sections run by what others have measured, and do not measure themselves.
    environment = (environment or dict(os.environ)) | {"PYTHONPATH": path, "MONTESSORI_CALIBRATE": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes) as child:
        failure = None
        try:
            output, errors = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # What it has started too: compilers, and the program that a sanitizer runs, would keep the device.
            os.killpg(child.pid, signal.SIGKILL)
            output, errors = child.communicate()
            failure = f"{TOOK_LONGER} {limit_s} s"
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    if child.returncode and failure is None:
        failure = f"exit status {child.returncode}"
    return Ended(time.perf_counter() - start, output, errors, failure)


def build() -> dict[str, Any]:
    """The CUDA library for the capability of this device, put beside the package's sources.

    Built apart from pyproject.toml, whose metadata an older setuptools would refuse. The CPU kernels may fail.
    """
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"MONTESSORI_CUDA_ARCHS": f"{major}{minor}a" if major == 9 else f"{major}{minor}"}
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(ROOT / "setup.py", place)
        shutil.copytree(ROOT / "csrc", Path(place) / "csrc")
        (Path(place) / "montessori").mkdir()
        ended = run([sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_LIMIT_S, environment, Path(place))
        built = {library.name for library in (Path(place) / "montessori").glob("*.so")}
        for name in built:
            shutil.copy(Path(place) / "montessori" / name, ROOT / "montessori")
    if cuda.LIBRARY.name not in built:
        ended = replace(ended, failure=ended.failure or f"{cuda.LIBRARY.name} was not built")
    return ended.outcome()


def run_section(name: str, limit_s: int) -> dict[str, Any]:
    """Result of one section, or its error."""
    ended = run([sys.executable, "-m", "benchmarks.gpu", "--section", name], limit_s)
    outcome = ended.outcome()
    if "error" in outcome:
        return outcome
    # Libraries may have the last word.
    told = [line for line in ended.output.splitlines() if line.startswith("{")]
    try:
        return outcome | {"result": json.loads(told[-1])}
    except (IndexError, ValueError):
        return replace(ended, failure="it told no result").outcome()


def calibrate(sections: dict[str, Any]) -> dict[str, Any]:
    """Keep for "auto" which of the kernels that were right is fastest; the sections after it use that."""
    timed, failed = {}, {}
    for name in (*calibration.HOPPER_KERNELS, "triton"):
        checked, measured = (sections[f"{what} {name}"] for what in ("checks", "linear"))
        if "result" in measured:
            timed[name] = measured["result"]["rows"]
        # A check that takes too long hangs; times that do may have had too little time left.
        elif last_line(checked).startswith((WRONG, TOOK_LONGER)):
            failed[name] = last_line(checked)
        elif last_line(measured).startswith(WRONG):
            failed[name] = last_line(measured)
    if not timed:
        return {"error": "no kernel gave right results", "failed": failed}
    try:
        return calibration.keep(timed, failed)
    except MontessoriError as error:
        return {"error": str(error), "failed": failed}


def sanitize(kind: str, name: str, limit_s: int) -> dict[str, Any]:
    """The checks of one kernel under one of compute-sanitizer's tools, at their own small shapes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return left_out("no compute-sanitizer")
    command = [tool, "--tool", kind, "--target-processes", "all", "--error-exitcode", "9", sys.executable]
    # Torch hands out pieces of large allocations, where what is written past the end of one hits the next unseen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = run([*command, "-m", "benchmarks.gpu", "--section", name], limit_s, environment)
    findings = [line for line in ended.output.splitlines() if line.startswith("=========")]
    summary = [line for line in findings if "SUMMARY" in line]
    return ended.outcome() | {"findings": findings[:MOST_FINDINGS], "summary": summary}


def left_out(reason: str) -> dict[str, Any]:
    return {"seconds": 0.0, "error": reason}


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

    def measure_section(name: str, section: gpu_sections.Section) -> dict[str, Any]:
        limit_s = min(section.limit_s, left(TOTAL_LIMIT_S))
        if section.needs and "error" in record["sections"][section.needs]:
            return left_out(f"left out: {section.needs} failed")
        return run_section(name, limit_s) if limit_s > 0 else left_out(NO_TIME)

    keep("sections", "build", build())
    for name, section in gpu_sections.SECTIONS.items():
        if name == gpu_sections.FIRST_SCORED:
            record["calibration"] = calibrate(record["sections"])
        keep("sections", name, measure_section(name, section))
    for kind, name in sanitized() if "sanitizer" in record else ():
        limit_s = min(SANITIZER_LIMIT_S, left(SANITIZED_LIMIT_S))
        if last_line(record["sections"][name]).startswith(TOOK_LONGER):
            outcome = left_out(f"left out: {name} hung")
        else:
            outcome = sanitize(kind, name, limit_s) if limit_s > 0 else left_out(NO_TIME)
        keep("sanitizer", f"{kind}: {name}", outcome)


def sanitized() -> Iterator[tuple[str, str]]:
    """Tool and section, what is written by hand first."""
    for kernels in (calibration.HOPPER_KERNELS, ("triton",)):
        for kind in SANITIZER_TOOLS:
            yield from ((kind, f"checks {kernel}") for kernel in kernels)


if __name__ == "__main__":
    main()
