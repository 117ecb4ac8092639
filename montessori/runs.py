"""Scoring runs on files: everything the command line does, as functions without a command line."""

from __future__ import annotations

import glob
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from montessori import ops, processes
from montessori.agreement import Agreement
from montessori.column_use import column_lines
from montessori.data import Rows, load_rows
from montessori.encoding import Encoded
from montessori.errors import ArgumentError, DataError, MontessoriError, ResourceError, StateError
from montessori.estimator import InfluenceEstimator
from montessori.fingerprint import check_outside, content_digest, installed, rows_digest
from montessori.inspection import agreement_table
from montessori.journal import ScoreJournal
from montessori.models import check_checkpoint, load_model
from montessori.options import DEFAULT_MAX_LENGTH, Options, check_lr, resolve_device
from montessori.scores import Audit, Scores
from montessori.wording import one_line
from montessori.writing import read_json, write_json

# All that some installation accepts; `ops.check_impl` says why one is not to be had here.
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ScoreSettings:
    """All that a scoring run depends on; `replay` of a saved config gives the same scores.

    `student` and `optimizer`: names or directories; `candidates`: a file, directory or hub name;
    `reference`: one or more of them, each `path` or `name=path`. The rest as in `InfluenceEstimator`.
    """

    student: str
    optimizer: str
    candidates: str
    reference: list[str]
    method: str = "anchored"
    backend: str = "auto"
    batch_tokens: int = 4096
    pilot: int = 8
    max_grad_norm: float | None = None
    lr: float | None = None
    reference_weighting: str = "example_mean"
    max_length: int | None = None
    truncation: str = "error"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dtype: str = "float32"
    device: str = "auto"
    split: str = "train"
    sample: float = 1.0
    reference_dtype: str = "float32"
    reference_batch_tokens: int = 4096
    invalid_rows: str = "error"


@dataclass(frozen=True)
class Workbench:
    """A loaded estimator and its candidates, tokenised."""

    estimator: InfluenceEstimator
    candidates: Encoded


@dataclass(frozen=True)
class Tables:
    """The rows that `settings` name, loaded when they are first asked for."""

    settings: ScoreSettings

    @cached_property
    def candidates(self) -> Rows:
        return load_rows(self.settings.candidates, split=self.settings.split, name="candidates")

    @cached_property
    def references(self) -> Any:
        return _load_references(self.settings)


def open_workbench(
    settings: ScoreSettings, tables: Tables | None = None, *, audit: int = 0, progress: bool = False
) -> Workbench:
    """The estimator and the candidates; what is cheap to get wrong is read and checked before the model.

    `tables`: rows of these settings that may be loaded already. `audit`: candidates that an audit will step on, 0 for
    none; too few of them are an error here. Raises MontessoriError.
    """
    check_audit(audit)
    check_settings(settings)
    _check_places(settings)
    device = resolve_device(settings.device, "--device")
    tables = tables or Tables(settings)
    candidates = tables.candidates
    check_audit(audit, len(candidates))
    references = tables.references
    model, tokenizer = load_model(settings.student, dtype=DTYPES[settings.dtype])
    tell_columns([candidates, *_by_name(references).values()])
    estimator = InfluenceEstimator(
        model.to(device),
        settings.optimizer,
        references,
        tokenizer=tokenizer,
        lr=settings.lr,
        reference_batch_tokens=settings.reference_batch_tokens,
        **_options(settings),
    )
    return Workbench(estimator, estimator.read(candidates, progress=progress))


def tell_columns(tables: Sequence[Rows]) -> None:
    """Say on stderr by which columns the rows of each of the `tables` are read, and which others they hold."""
    for line in column_lines(tables) if processes.is_main() else ():
        print(line, file=sys.stderr)


def check_settings(settings: ScoreSettings) -> None:
    """What can be seen without a model and rows, before files are digested and the model is loaded, which take long.

    Raises ArgumentError.
    """
    if settings.dtype not in DTYPES:
        raise ArgumentError(f"dtype={settings.dtype!r}: expected one of {', '.join(DTYPES)}")
    ops.check_impl(settings.backend, "--backend")
    resolve_device(settings.device, "--device")
    check_lr(settings.lr)
    for option in ("student", "optimizer", "candidates"):
        if not getattr(settings, option):
            raise ArgumentError(f"--{option}: expected a path or a name, got an empty one")
    for entry in settings.reference:
        if not _reference_path(entry)[2]:
            raise ArgumentError(f"--reference {entry}: expected name=path, the path is empty")
    options = _options(settings)
    Options(**{**options, "max_length": DEFAULT_MAX_LENGTH if settings.max_length is None else settings.max_length})


def _options(settings: ScoreSettings) -> dict[str, Any]:
    return {entry.name: getattr(settings, entry.name) for entry in fields(Options)}


def _check_places(settings: ScoreSettings) -> None:
    """Raise ModelError or StateError for a path without a checkpoint."""
    check_checkpoint(settings.student)
    if not Path(settings.optimizer).expanduser().exists():
        raise StateError(
            f"--optimizer {settings.optimizer}: no such directory; expected a checkpoint with the optimizer's state"
        )


def check_audit(size: int, num_candidates: int | None = None) -> None:
    """Raise ArgumentError unless an audit of `size` candidates, 0 for none, has two of them to compare."""
    if size < 0 or size == 1:
        raise ArgumentError(f"audit of {size}: expected at least 2 candidates to compare, or 0 for no audit")
    if size and num_candidates is not None and num_candidates < 2:
        raise ArgumentError(f"audit of {size}: expected at least 2 candidates to compare, got {num_candidates}")


def score_to_file(settings: ScoreSettings, out: Path, *, fresh: bool, audit: int, progress: bool) -> Scores:
    """Score, keep finished batches beside `out`, and write `out`, its config and the audit; return the scores.

    A killed run that is started again with the same settings goes on, and scores that are complete get the audit
    that they lack. `fresh` forgets earlier work. Under torchrun the processes share the candidates, and the first
    writes. Raises ArgumentError when `out` holds the scores of other settings, when it lies in a folder that is read,
    and for an audit of fewer than 2.
    """
    check_audit(audit)
    check_settings(settings)
    check_out(settings, out)
    _check_places(settings)
    config_path = _config_path(out)
    own = f".{processes.rank()}" if processes.rank() else ""
    journal = ScoreJournal(out.with_name(f"{out.name}.journal{own}.jsonl"))
    # Read before anything else: a mistyped path must not cost what is there.
    made = {"command": "score", "settings": asdict(settings), "versions": versions()}
    tables = Tables(settings)
    config = processes.main_does(lambda: made | {"inputs": _inputs(settings, tables)})
    bench = None
    scored = not fresh and processes.from_main(out.exists() and not journal.path.exists())
    if scored:
        scores = _finished(out, config_path, config)
    else:
        check_writable(out)
        bench = open_workbench(settings, tables, audit=audit, progress=progress)
        if fresh:
            journal.remove()
        scores = bench.estimator.score(
            bench.candidates,
            batch_tokens=settings.batch_tokens,
            progress=progress,
            journal=journal,
            distributed=True,
        )
        if processes.is_main():
            # Neither an audit nor a config of other scores may stand beside these, whenever a kill comes.
            _audit_path(out).unlink(missing_ok=True)
            config_path.unlink(missing_ok=True)
            scores.save(out)
            write_json(config_path, config)
        processes.wait_for_all()
        journal.remove()
        if processes.is_main():
            _remove_journals_of_more_processes(out)
    if processes.is_main():
        if audit and not _is_audited(out, audit):
            bench = bench or open_workbench(settings, tables, audit=audit, progress=progress)
            _audit(bench, out, audit, progress)
        elif scored:
            print(f"{out} is complete; pass --fresh to score again", file=sys.stderr)
    processes.wait_for_all()
    return scores


def _remove_journals_of_more_processes(out: Path) -> None:
    """What an earlier run on more processes, cut short, has left beside the scores."""
    for path in out.parent.glob(f"{glob.escape(out.name)}.journal.*.jsonl"):
        rank = path.name.removeprefix(f"{out.name}.journal.").removesuffix(".jsonl")
        if rank.isdecimal() and int(rank) >= processes.world_size():
            path.unlink()


def _audit(bench: Workbench, out: Path, size: int, progress: bool) -> None:
    """Write the audit of the scores in `out` beside them, and how many candidates were asked for."""
    try:
        result = bench.estimator.audit(bench.candidates, k=size, progress=progress)
    except MontessoriError as error:
        raise type(error)(f"{error}; the scores are in {out}") from error
    write_json(_audit_path(out), {**audit_record(result), "asked": size})


def _is_audited(out: Path, size: int) -> bool:
    """Whether an audit of `size` candidates stands beside the scores `out`."""
    try:
        record = json.loads(_audit_path(out).read_text(encoding="utf-8"))
        # Files of earlier versions do not say how many were asked for.
        return record.get("asked", len(record["index"]) + len(record.get("skipped", ()))) == size
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def audit_record(audit: Audit) -> dict[str, Any]:
    """The audit as plain numbers, for JSON."""
    return {
        "index": audit.index.tolist(),
        "predicted": audit.predicted.tolist(),
        "real": audit.real.tolist(),
        "skipped": list(audit.skipped),
        "agreement": {name: agreement.to_dict() for name, agreement in audit.agreement.items()},
        "centred_agreement": {name: agreement.to_dict() for name, agreement in audit.centred_agreement.items()},
    }


def read_audit_table(out: Path) -> Table:
    """The agreement with real steps that was saved beside the scores `out`. Raises DataError where none was."""
    path = _audit_path(out)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        agreements = {name: Agreement(**values) for name, values in record["agreement"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected the audit of these scores ({one_line(error)}); pass --audit N") from error
    return agreement_table("influence: predicted against real steps", agreements)


def _config_path(out: Path) -> Path:
    return out.with_name(out.name + ".config.json")


def _audit_path(out: Path) -> Path:
    return out.with_name(out.name + ".audit.json")


def check_scored(out: Path, rows: Rows) -> None:
    """Raise DataError when the config beside the scores in `out` says that other rows were scored."""
    config = _config_path(out)
    before = _read_config(config).get("inputs", {}).get("candidates") if config.exists() else None
    if before is not None and before != rows_digest(rows):
        raise DataError(f"{rows.source}: expected the rows that were scored, got others, or in another order")


def _read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        return {**config, "settings": dict(config["settings"])}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected a config written by montessori score, got {error!r}") from error


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a config written by a run. Raises DataError when it is not one."""
    settings = _read_config(path)["settings"]
    known = {entry.name for entry in fields(ScoreSettings)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise DataError(f"{path}: unknown setting {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    return settings


def versions() -> dict[str, str]:
    names = ("montessori", "torch", "transformers", "datasets", "tokenizers")
    return {"python": platform.python_version(), **installed(*names)}


def _finished(out: Path, config_path: Path, config: dict[str, Any]) -> Scores:
    """The scores in `out`. Raises ArgumentError unless `config` would give the same."""
    settings = read_settings(config_path) if config_path.exists() else None
    # A setting that an earlier version did not know had the effect of its default.
    if settings is None or _defaults() | settings != json.loads(json.dumps(config["settings"])):
        raise ArgumentError(
            f"{out}: exists and was not written with these settings; choose another --out or pass --fresh"
        )
    before = _read_config(config_path).get("inputs", {})
    changed = sorted(name for name, digest in config["inputs"].items() if before.get(name) != digest)
    if changed:
        raise ArgumentError(
            f"{out}: exists, and {', '.join(changed)} changed since; choose another --out or pass --fresh"
        )
    return Scores.load(out)


def _defaults() -> dict[str, Any]:
    return {entry.name: entry.default for entry in fields(ScoreSettings) if entry.default is not MISSING}


def check_out(settings: ScoreSettings, out: Path) -> None:
    """Raise ArgumentError when `out` lies in a folder that these settings read."""
    references = {f"--reference {entry}": _reference_path(entry)[2] for entry in settings.reference}
    own = {"--candidates": settings.candidates, "--student": settings.student, "--optimizer": settings.optimizer}
    check_outside(out, "--out", own | references)


def check_audit_out(settings: ScoreSettings, out: Path) -> None:
    """Raise ArgumentError or ResourceError unless an audit can be written at `out`, where nothing but another is."""
    check_out(settings, out)
    check_writable(out)
    if out.exists():
        try:
            is_audit = "agreement" in read_json(out)
        except (DataError, TypeError):
            is_audit = False
        if not is_audit:
            raise ArgumentError(f"--out {out}: exists and is no audit; choose another --out")


def check_writable(out: Path) -> None:
    """Raise ResourceError unless a file can be written at `out`, whose folder is made."""
    if out.is_dir():
        raise ResourceError(f"{out}: cannot be written (it is a directory): name a file")
    probe = out.with_name(f"{out.name}.{processes.rank()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written ({error.strerror or error})") from error


def _inputs(settings: ScoreSettings, tables: Tables) -> dict[str, str]:
    """Digests of what the settings name: a file that changed under its name is another one."""
    sets = _by_name(tables.references)
    named = {"student": settings.student, "optimizer": settings.optimizer}
    if settings.chat_template is not None and settings.chat_template.endswith(".jinja"):
        named["chat template"] = settings.chat_template
    there = {name: place for name, path in named.items() if (place := Path(path).expanduser()).exists()}
    digests = {place: content_digest(place) for place in dict.fromkeys(there.values())}
    return {
        "candidates": rows_digest(tables.candidates),
        **{f"reference {name}": rows_digest(rows) for name, rows in sets.items()},
        **{name: digests[place] for name, place in there.items()},
    }


def _reference_path(entry: str) -> tuple[str, str, str]:
    """Name and path of an entry name=path with "=" between them; a path alone is named after its file."""
    name, found, path = entry.partition("=")
    return (Path(entry).stem, "", entry) if not found or Path(entry).exists() else (name, found, path)


def _by_name(references: Any) -> dict[str, Rows]:
    return references if isinstance(references, dict) else {"reference": references}


def _load_references(settings: ScoreSettings) -> Any:
    """Rows of each named set; those alone where there is one set without a name."""
    named: dict[str, Rows] = {}
    for entry in settings.reference:
        name, found, path = _reference_path(entry)
        if not name:
            raise ArgumentError(f"--reference {entry}: expected name=path, the name is empty")
        if name in named:
            raise ArgumentError(f"--reference {entry}: the name {name!r} is taken; give name=path")
        named[name] = load_rows(path, split=settings.split, name=name)
    if not named:
        raise ArgumentError("--reference: expected at least one file, directory or hub name")
    return next(iter(named.values())) if len(named) == 1 and not found else named
