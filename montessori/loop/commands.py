"""Commands of the loop: run, generate, demo, settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from montessori.errors import ArgumentError
from montessori.loop import report
from montessori.loop.config import PRESETS, Config, read_config
from montessori.loop.round import STAGES, run
from montessori.loop.rundir import RunDirectory
from montessori.loop.settings import settings_page
from montessori.terminal import OutputFolder, bars_of_libraries

CONFIG_OPTIONS = [
    click.argument("config", required=False, type=click.Path(path_type=Path)),
    click.option("--preset", type=click.Choice(PRESETS), help="Settings to begin with; those of CONFIG go over them."),
    click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting over all others; repeatable."
    ),
    click.option("--out", type=OutputFolder(), required=True, help="Directory of the run."),
    click.option("--resume/--fresh", default=True, show_default=True, help="Go on with what is there, or redo it."),
    click.option("--quiet", is_flag=True, help="No progress bars."),
]


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works in the directory of a run."""
    for option in reversed(CONFIG_OPTIONS):
        command = option(command)
    return command


@click.command("run")
@config_options
@click.option("--until", type=click.Choice(STAGES), help="Stop after this stage of the last round.")
@click.option(
    "--from",
    "since",
    metavar="STAGE",
    help="Redo it and what follows: of the last round that has it, or round_1/STAGE.",
)
def run_command(config: Path | None, preset: str | None, assignments: tuple[str, ...], out: Path, resume: bool,
                quiet: bool, until: str | None, since: str | None) -> None:  # fmt: skip
    """Run the whole loop: the teacher writes, the student learns, the teacher is tuned, the student is trained.

    CONFIG is a YAML file; a finished stage is skipped, and an interrupted run goes on with the same command.
    """
    settings = read_run_config(config, preset, assignments, out)
    carry_out(settings, out, until=until, since=since, fresh=not resume, progress=not quiet)


@click.command("generate")
@config_options
def generate_command(config: Path | None, preset: str | None, assignments: tuple[str, ...], out: Path, resume: bool,
                     quiet: bool) -> None:  # fmt: skip
    """Write instructions and responses with the teacher, filtered and split into warm-up and probing set."""
    settings = read_run_config(config, preset, assignments, out)
    carry_out(settings, out, only="generate", fresh=not resume, progress=not quiet)


@click.command("demo")
@click.option("--out", type=OutputFolder(), default=Path("out/demo"), show_default=True)
def demo_command(out: Path) -> None:
    """One small round with SmolLM2-135M as teacher and student."""
    carry_out(read_config(preset="demo"), out)


@click.command("settings")
def settings_command() -> None:
    """Print all settings of a run, as Markdown: what they mean, defaults, and what each preset sets."""
    click.echo(settings_page(), nl=False)


def carry_out(settings: Config, out: Path, **options: Any) -> None:
    """`montessori.loop.round.run`, with what came out on the terminal."""
    # They would hide those of the stages.
    with bars_of_libraries(shown=False):
        page = run(settings, out, **options)
    show_run(out, page)


def show_run(out: Path, page: Path | None) -> None:
    """Print the costs, the main numbers and the report of the run in `out`."""
    console = Console()
    table = Table("stage", "seconds", "share", "tokens", "tokens/s", title="cost")
    for row in report.cost_rows(RunDirectory(out).costs()):
        table.add_row(*row)
    console.print(table)
    for name, value in report.headline(out):
        console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
    if page is not None:
        console.print(f"report: {page}", soft_wrap=True, highlight=False, markup=False)


def read_run_config(config: Path | None, preset: str | None, assignments: tuple[str, ...], out: Path) -> Config:
    """The config that the command line names, or that of the run in `out` where it names none.

    Raises ArgumentError when there is neither, or it is wrong.
    """
    kept = out / "config.yaml"
    if config is None and preset is None and kept.is_file():
        # A run goes on from its own config.
        return read_config(kept, None, assignments)
    if config is None and preset is None and not assignments:
        raise ArgumentError(
            f"expected a CONFIG file or --preset ({', '.join(PRESETS)}), got neither, and there is no {kept} to go on "
            "from"
        )
    return read_config(config, preset, assignments)
