"""The command line: the estimator's commands, and those of the loop."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from montessori import calibration, inspection, processes, runs
from montessori.data import Rows, load_rows
from montessori.encoding import INVALID_ROWS, TRUNCATIONS, encode_rows
from montessori.errors import MontessoriError
from montessori.fingerprint import check_outside
from montessori.loop.commands import demo_command, generate_command, run_command, settings_command
from montessori.loop.training_commands import STAGE_COMMANDS
from montessori.models import check_checkpoint, check_token_ids, load_model
from montessori.options import METHODS, REFERENCE_DTYPES, check_positions, default_max_length
from montessori.referenceset import WEIGHTINGS
from montessori.runs import BACKENDS, DTYPES, ScoreSettings
from montessori.scores import Scores
from montessori.terminal import JsonObject, OutputFile, OutputFolder, bars_of_libraries
from montessori.warmup import RECORD_FILE, check_training
from montessori.warmup import warmup as run_warmup
from montessori.writing import write_json

Command = Callable[..., Any]
WITHOUT_RESUME = {"audit", "inspect", "calibrate", "report", "settings"}
POSITIVE = click.FloatRange(min=0, min_open=True)


def _use_config(context: click.Context, _option: click.Parameter, path: str | None) -> None:
    if path is not None:
        context.default_map = {**(context.default_map or {}), **runs.read_settings(path)}


DATA_HELP = (
    "JSON Lines, JSON, CSV (each also as .gz or .zst) or Parquet file, folder of such files, saved dataset or hub name."
)
# Names of the parameters that TEXT_OPTIONS set.
TEXT_SETTINGS = ("max_length", "truncation", "chat_template", "chat_template_kwargs", "split")
TEXT_OPTIONS = [
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        help="Most tokens of an example. [default: 2048, or the model's limit]",
    ),
    click.option(
        "--truncation",
        type=click.Choice(TRUNCATIONS),
        default="error",
        show_default=True,
        help="What happens to longer examples.",
    ),
    click.option(
        "--chat-template",
        help="Jinja template, path to a .jinja file, or chatml / plain / none. [default: the tokenizer's]",
    ),
    click.option(
        "--chat-template-kwargs",
        type=JsonObject(),
        help="Variables that the chat template is given with every row, as JSON: '{\"enable_thinking\": false}'.",
    ),
    click.option("--split", default="train", show_default=True, help="Split of a dataset that has several."),
]
SCORING_OPTIONS = [
    click.option(
        "--config",
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=_use_config,
        help="Replay the settings of an earlier run; other options override them.",
    ),
    click.option("--student", required=True, help="smollm2-135m, a checkpoint directory or a hub name."),
    click.option("--optimizer", required=True, help="Checkpoint directory with the student's optimizer state."),
    click.option("--candidates", required=True, help=DATA_HELP),
    click.option(
        "--reference", required=True, multiple=True, help="As --candidates; repeat as name=path for several sets."
    ),
    click.option("--method", type=click.Choice(METHODS), default="anchored", show_default=True),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="What computes the scores. auto: compiled kernels; on a GPU the fastest there, which calibrate measures, "
        "or else the first score in bfloat16 or float16.",
    ),
    click.option(
        "--pilot",
        type=click.IntRange(min=0),
        default=8,
        show_default=True,
        help="Candidates that set the anchor; 0 anchors at the step with g = 0.",
    ),
    click.option(
        "--sample",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Share of each weight to score; less is faster, with a standard error.",
    ),
    click.option("--max-grad-norm", type=POSITIVE, help="Clip each step by global norm. [default: no clipping]"),
    click.option("--lr", type=float, help="Learning rate of the step. [default: the optimizer's]"),
    click.option("--reference-weighting", type=click.Choice(WEIGHTINGS), default="example_mean", show_default=True),
    click.option(
        "--reference-dtype",
        type=click.Choice(REFERENCE_DTYPES),
        default="float32",
        show_default=True,
        help="model: no float32 copy of a narrower student; needs --method first_order.",
    ),
    click.option(
        "--reference-batch-tokens",
        type=click.IntRange(min=1),
        default=4096,
        show_default=True,
        help="Padded tokens of a batch of the reference, at most 1,024 on a CPU; bounds memory, not the result.",
    ),
    click.option(
        "--invalid-rows",
        type=click.Choice(INVALID_ROWS),
        default="error",
        show_default=True,
        help="What happens to candidates that are no example: no answer, columns missing.",
    ),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True),
    click.option("--device", default="auto", show_default=True),
    *TEXT_OPTIONS,
]


def _with(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _settings(values: dict[str, Any]) -> ScoreSettings:
    return ScoreSettings(**{**values, "reference": list(values["reference"])})


def _warm_up(student: str, data: str, out: Path, text: dict[str, Any] | None = None, **training: Any) -> Path:
    text = {"max_length": None, "truncation": "error", "split": "train", **(text or {})}
    check_training(**{name: value for name, value in training.items() if name != "progress"})
    check_checkpoint(student)
    check_outside(out, "--out", {"--student": student, "--data": data})
    rows = load_rows(data, split=text.pop("split"), name="data")
    runs.tell_columns([rows])
    # Before the model, which may take long to load; where nothing comes of it, no empty folder is left.
    runs.check_writable(out / RECORD_FILE if out.exists() else out)
    model, tokenizer = load_model(student)
    check_positions(model, text["max_length"] or 1)
    text["max_length"] = text["max_length"] or default_max_length(model)
    encoded = encode_rows(rows, tokenizer, name="data", progress=training.get("progress", True), **text)
    for reason, count in sorted(Counter(encoded.skipped.values()).items()):
        click.echo(f"left out ({reason}): {count} of {len(rows)} rows", err=True)
    check_token_ids(model, encoded.examples, rows)
    return run_warmup(model, tokenizer, encoded.examples, out, **training)


def _show(console: Console, scores: Scores, rows: Rows | None, quantity: str, name: str | None, top: int) -> None:
    inspection.print_summary(console, scores)
    values = inspection.select(scores, quantity, name)
    inspection.print_histogram(console, values[scores.ok], f"{quantity} on {name or scores.names[0]}")
    inspection.print_extremes(console, scores, values, top, rows)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="montessori")
def cli() -> None:
    """What one optimizer step on each training candidate would do to a reference loss."""


@cli.command()
@click.option("--student", required=True, help="smollm2-135m, a checkpoint directory or a hub name.")
@click.option("--data", required=True, help=DATA_HELP)
@click.option("--out", required=True, type=OutputFolder(), help="Directory of the checkpoints.")
@click.option(
    "--learning-rate",
    type=POSITIVE,
    default=5e-6,
    show_default=True,
    help="Reached at the end, from 0; kept for scoring.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Examples per step.")
@click.option("--per-device-train-batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--epochs", type=POSITIVE, default=1.0, show_default=True)
@click.option(
    "--max-steps",
    type=click.IntRange(max=2**31 - 1),
    default=-1,
    help="Steps, in the place of --epochs. [default: as --epochs says]",
)
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--max-grad-norm", type=POSITIVE, help="Clip by global norm; score with the same. [default: no clipping]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=42, show_default=True)
@_with(TEXT_OPTIONS)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def warmup(student: str, data: str, out: Path, epochs: float, quiet: bool, **training: Any) -> None:
    """Fine-tune a student for a few AdamW steps and keep its optimizer state."""
    text = {name: training.pop(name) for name in TEXT_SETTINGS}
    with bars_of_libraries(shown=not quiet):
        checkpoint = _warm_up(student, data, out, text, num_train_epochs=epochs, progress=not quiet, **training)
    click.echo(f"checkpoint: {checkpoint}")
    clipping = "" if training["max_grad_norm"] is None else f"--max-grad-norm {training['max_grad_norm']} "
    click.echo(f"score with: montessori score --student {checkpoint} --optimizer {checkpoint} {clipping}…")


@cli.command()
@_with(SCORING_OPTIONS)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Padded tokens of a batch of candidates; bounds memory, not the result.",
)
@click.option("--out", required=True, type=OutputFile(".parquet"), help="Parquet file to write.")
@click.option(
    "--audit",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Check against this many real steps, 2 or more; 0 for none.",
)
@click.option("--resume/--fresh", default=True, show_default=True, help="Go on with a killed run, or forget it.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def score(out: Path, audit: int, resume: bool, quiet: bool, **values: Any) -> None:
    """Score every candidate by what one optimizer step on it would do to the reference loss."""
    with bars_of_libraries(shown=not quiet):
        scores = runs.score_to_file(_settings(values), out, fresh=not resume, audit=audit, progress=not quiet)
    console = Console()
    inspection.print_summary(console, scores)
    console.print(f"scores: {out}", soft_wrap=True, markup=False)
    if audit:
        console.print(runs.read_audit_table(out))


@cli.command()
@_with(SCORING_OPTIONS)
@click.option("-k", "size", type=click.IntRange(min=2), default=16, show_default=True, help="Candidates to step on.")
@click.option("--out", type=OutputFile(".json"), help="JSON file with both sides of the comparison.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def audit(size: int, out: Path | None, quiet: bool, **values: Any) -> None:
    """Compare predicted influence with real float32 steps on a sample of the candidates."""
    settings = _settings(values)
    if out is not None:
        runs.check_audit_out(settings, out)
    with bars_of_libraries(shown=not quiet):
        bench = runs.open_workbench(settings, audit=size, progress=not quiet)
        result = bench.estimator.audit(bench.candidates, k=size, progress=not quiet)
    console = Console()
    console.print(inspection.agreement_table("influence: predicted against real steps", result.agreement))
    console.print(inspection.agreement_table("centred: the same without the shared drift", result.centred_agreement))
    if out is not None and processes.is_main():
        write_json(out, runs.audit_record(result))


@cli.command()
@click.argument("scores_file", type=click.Path())
@click.option("--candidates", help="The scored file, to show its text.")
@click.option("--split", default="train", show_default=True)
@click.option("--top", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--quantity", type=click.Choice(inspection.QUANTITIES), default="influence", show_default=True)
@click.option("--set", "name", help="Reference set, where there are several. [default: the first]")
@click.option("--png", type=OutputFile(".png"), help="Write the histogram there.")
def inspect(scores_file: str, candidates: str | None, split: str, top: int, quantity: str,
            name: str | None, png: Path | None) -> None:  # fmt: skip
    """Show the best and worst candidates and the distribution of influence."""
    scores = Scores.load(scores_file)
    rows = load_rows(candidates, split=split) if candidates else None
    if rows is not None and len(rows) != len(scores):
        raise MontessoriError(f"{candidates}: expected the {len(scores)} scored rows, got {len(rows)}")
    if rows is not None:
        runs.check_scored(Path(scores_file).expanduser(), rows)
    console = Console()
    _show(console, scores, rows, quantity, name, top)
    if png is not None and processes.is_main():
        inspection.save_histogram(scores, png, quantity, () if name is None else (name,))
        console.print(f"wrote {png}", soft_wrap=True, markup=False)


@cli.command()
def calibrate() -> None:
    """Find the fastest kernels for the GPU of this machine; from then on, auto takes them.

    Each is checked against float64 and timed, in a process of its own. The choice is kept in
    $MONTESSORI_CACHE until the package, torch or Triton change.
    """
    console = Console()

    def report(name: str, outcome: dict[str, Any]) -> None:
        rows = outcome.get("rows", [])
        shown = "  ".join(f"{row['state']} T={row['T']} {row['ratio']:.2f}" for row in rows)
        console.print(f"{name}: {outcome.get('error', shown)}", soft_wrap=True, markup=False)

    for state, names in calibration.calibrate(report)["ranking"].items():
        console.print(f"state in {state}, fastest first: {', '.join(names)}", soft_wrap=True)


for command in (run_command, generate_command, *STAGE_COMMANDS, demo_command, settings_command):
    cli.add_command(command)


def main() -> None:
    """Entry point: errors for people are one line on stderr and exit status 2. Of several processes one speaks."""
    processes.start_processes()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that has no "…" gets "?".
            stream.reconfigure(errors="replace")
    try:
        with ExitStack() as stack:
            if not processes.is_main():
                stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        resumable = not set(sys.argv[1:2]) <= WITHOUT_RESUME
        fresh = ", without --fresh," if "--fresh" in sys.argv else ""
        click.echo("interrupted" + f"; the same command{fresh} goes on from here" * resumable, err=True)
        sys.exit(130)
    except MontessoriError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        # Of Path.expanduser.
        if "home directory" not in str(error):
            raise
        click.echo("error: a path begins with ~ and the name of somebody who has no home here", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            if error.filename is None:
                raise
            # A file that may not be read, a name that is too long, links that lead nowhere.
            click.echo(f"error: {os.fsdecode(error.filename)}: {error.strerror}", err=True)
            sys.exit(2)
        # Of output that nothing takes; what remains of it is not written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # Who reads it, `head` say, has seen enough.
            sys.exit(1)
        click.echo(f"error: the output cannot be written ({error.strerror})", err=True)
        sys.exit(2)
