"""Commands of the loop that work on one stage of a run: pairs, tune, train, evaluate; and its report."""

from __future__ import annotations

from pathlib import Path

import click

from montessori.loop import report
from montessori.loop.commands import carry_out, config_options, read_run_config, show_run
from montessori.loop.rundir import RunDirectory


def _stage_command(stage: str, text: str) -> click.Command:
    @click.command(stage, help=text)
    @config_options
    def command(config: Path | None, preset: str | None, assignments: tuple[str, ...], out: Path, resume: bool,
                quiet: bool) -> None:  # fmt: skip
        settings = read_run_config(config, preset, assignments, out)
        carry_out(settings, out, only=stage, fresh=not resume, progress=not quiet)

    return command


pairs_command = _stage_command(
    "pairs", "Set the siblings of each prompt against each other: the helpful above the harmful."
)
tune_command = _stage_command("tune", "Train the teacher to write more of what helped: DPO on the pairs, or SFT.")
train_command = _stage_command("train", "Train the student, from its base weights, on the final set.")
evaluate_command = _stage_command(
    "evaluate", "Measure held-out loss, real influence of what each teacher wrote and, with a judge, the win rate."
)


@click.command("report")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def report_command(directory: Path) -> None:
    """Write report.html and its pictures into the DIRECTORY of a run."""
    show_run(directory, report.run(directory, RunDirectory(directory).costs()))


STAGE_COMMANDS = (pairs_command, tune_command, train_command, evaluate_command, report_command)
