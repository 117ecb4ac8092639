"""Seconds and tokens per stage of a round, and the share of scoring.

    python -m benchmarks.loop --preset demo --run out/bench/loop_demo

Runs the preset in that directory, or goes on with what is there; a finished run is only read. With `--existing` a
directory that is not there is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import write_result
from montessori.loop.commands import carry_out
from montessori.loop.config import PRESETS, read_config
from montessori.loop.rundir import RunDirectory


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--preset", choices=PRESETS, default="demo")
    options.add_argument("--run", type=Path, default=Path("out/bench/loop_demo"), help="directory of the run")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--existing", action="store_true", help="only if the run is there")
    arguments = options.parse_args()
    if arguments.existing and not arguments.run.exists():
        print(f"{arguments.run}: no run, loop left out; `make demo` makes one")
        return
    torch.set_num_threads(arguments.threads)
    carry_out(read_config(preset=arguments.preset), arguments.run)
    costs = RunDirectory(arguments.run).costs()
    stages = [{"stage": name, "seconds": c["seconds"], "tokens": c.get("tokens", 0)} for name, c in costs.items()]
    del arguments.run, arguments.existing
    print(f"wrote {write_result(f'loop_{arguments.preset}', arguments, {'stages': stages})}")


if __name__ == "__main__":
    main()
