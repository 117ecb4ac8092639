"""The optimizer in a checkpoint of DeepSpeed's ZeRO, stages 1 to 3: every rank's file has a part of each group.

Stages 1 and 2 cut the parameters of a group, one after the other, into one piece for each rank. Stage 3 cuts each
parameter by itself, and a group into sub-groups. DeepSpeed is not needed: its own classes in the files are read as
empty ones, with `weights_only=True`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from montessori.errors import StateError
from montessori.wording import first_line

_RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STAGES_1_2, _STAGE_3 = "base_optimizer_state", "optimizer_state_dict"
_MASTERS = {_STAGES_1_2: "single_partition_of_fp32_groups", _STAGE_3: "fp32_flat_groups"}


def zero_directory(path: Path) -> Path | None:
    """Where the files of the ranks lie: `path`, or the folder that its `latest` names; None without such files.

    Raises StateError when `latest` names none of the folders that have them.
    """
    latest, others = path / "latest", sorted({file.parent.name for file in path.glob("*/*_optim_states.pt")})
    if not (latest.is_file() and others):
        return path if any(path.glob("*_optim_states.pt")) else None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag not in others:
        raise StateError(f"{latest}: expected one of {', '.join(others)}, got {tag!r}")
    return path / tag


def read_zero(directory: Path, is_decayed: Callable[[str], bool], weights: Mapping[str, Tensor]) -> dict:
    """`state` and `param_groups` as a torch optimizer's state dict, parameters by name, tensors whole on the CPU.

    `weights` are the model's, which the float32 ones beside the moments have to resemble. `is_decayed` is Trainer's
    rule by which a parameter has weight decay. It is asked where stage 3 has cut two groups into more sub-groups, and
    the files do not say which belongs to which. Raises StateError for anything else.
    """
    ranks = [_optimizer(file) for file in _rank_files(directory)]
    module, shapes = _model(directory)
    stage = _STAGES_1_2 if _STAGES_1_2 in ranks[0] else _STAGE_3
    cut = _cut_all if stage == _STAGES_1_2 else _cut_each
    inner = [rank[stage] for rank in ranks if isinstance(rank.get(stage), Mapping) and _MASTERS[stage] in rank]
    if len(inner) < len(ranks) or not all(saved.keys() >= {"state", "param_groups"} for saved in inner):
        raise StateError(
            f"{directory}: expected a torch optimizer's state and {_MASTERS[stage]} for each rank, got those of "
            f"{len(inner)} of {len(ranks)} (an elastic checkpoint?)"
        )
    options = _options(directory, inner[0]["param_groups"], shapes, is_decayed)
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(names) for names in shapes]
    state: dict[str, dict] = {}
    for number, (names, padding) in enumerate(zip(shapes, paddings, strict=True)):
        if not names:
            continue
        entries = [saved["state"].get(number, {}) for saved in inner]
        if not all(set(_MOMENTS) <= entry.keys() for entry in entries):
            raise StateError(f"{directory}: {next(iter(names))} and its group have no moments: train, then save")
        step = entries[0].get("step", options[number].get("step", 0))
        masters = dict(cut(directory, names, [rank[_MASTERS[stage]][number] for rank in ranks], padding))
        _check_layout(directory, masters, module if stage == _STAGES_1_2 else {}, weights)
        moments = {
            label: dict(cut(directory, names, [entry[label] for entry in entries], padding)) for label in _MOMENTS
        }
        state |= {name: {"step": step} | {label: moments[label][name] for label in _MOMENTS} for name in names}
    groups = [group | {"params": list(names)} for names, group in zip(shapes, options, strict=True)]
    return {"state": state, "param_groups": groups}


def _rank_files(directory: Path) -> list[Path]:
    ranks: dict[Path, int] = {}
    for file in directory.glob("*_optim_states.pt"):
        match = _RANK_FILE.fullmatch(file.name)
        if match is None or int(match[2]):
            raise StateError(
                f"{directory}: {file.name}: expected one file for each rank of data parallelism; tensor and expert "
                "parallelism of DeepSpeed are not supported"
            )
        ranks[file] = int(match[1])
    return sorted(ranks, key=ranks.__getitem__)


def _optimizer(file: Path) -> Mapping:
    saved = _load(file)
    optimizer = saved.get("optimizer_state_dict")
    if not isinstance(optimizer, Mapping) or "partition_count" not in optimizer:
        raise StateError(f"{file}: expected the optimizer of ZeRO, got {', '.join(map(str, list(saved)[:5]))}")
    count = optimizer["partition_count"]
    expected = max(count) if isinstance(count, Sequence) else count
    present = len(_rank_files(file.parent))
    if expected != present:
        raise StateError(f"{file.parent}: expected the files of {expected} ranks, got {present}: copy all of them")
    return optimizer


def _model(directory: Path) -> tuple[Mapping[str, Tensor], list[Mapping[str, torch.Size]]]:
    """Weights as the module has them, and for each group the shapes of its parameters in the order of the pieces."""
    file = next((directory / name for name in _MODEL_FILES if (directory / name).is_file()), None)
    if file is None:
        raise StateError(f"{directory}: expected {' or '.join(_MODEL_FILES)}, which name the parameters")
    saved = _load(file)
    shapes = saved.get("param_shapes")
    if not isinstance(shapes, list) or not all(isinstance(names, Mapping) for names in shapes):
        raise StateError(f"{file}: expected param_shapes, a dict for each group, got {type(shapes).__name__}")
    return saved.get("module") or {}, [{name: torch.Size(shape) for name, shape in names.items()} for names in shapes]


def _check_layout(
    directory: Path, masters: dict[str, Tensor], module: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Moments lie as the float32 weights beside them do, and those are known: a layout read wrongly shows here.

    `module` was saved with them and is the same to the bit; `weights` may be of another step.
    """
    for name in (next(iter(masters)), next(reversed(masters))):
        master, weight = masters[name], module.get(name)
        same = weight is None or torch.equal(master.to(weight.dtype), weight)
        if not (same and _resembles(master, weights.get(name))):
            raise StateError(
                f"{directory}: {name} of the optimizer is not that of the model: another model, files of several "
                "saves or ranks exchanged, or a version of DeepSpeed that lays them out in another way"
            )


def _resembles(master: Tensor, weight: Tensor | None) -> bool:
    """Whether the two point the same way; vectors, which are often alike or 0, and what is elsewhere say nothing."""
    if weight is None or weight.dim() < 2 or weight.shape != master.shape or weight.is_meta:
        return True
    master, weight = master.double().flatten(), weight.detach().cpu().double().flatten()
    size = master.norm() * weight.norm()
    return bool(size == 0 or master @ weight > 0.5 * size)


def _options(
    directory: Path, groups: Sequence[Mapping], shapes: Sequence[Mapping], is_decayed: Callable[[str], bool]
) -> list[dict]:
    """Options of each group of `shapes`, in the form that `montessori.optim_state` knows."""
    known = [{"amsgrad": False} | {key: group[key] for key in group if key != "params"} for group in groups]
    if any(group.get("bias_correction") is False for group in known):
        raise StateError(f"{directory}: bias_correction=False is not supported")
    if len(known) == len(shapes):
        return known
    if all(group == known[0] for group in known):
        return known[:1] * len(shapes)
    decayed = [{is_decayed(name) for name in names} for names in shapes]
    in_order = [sides != {True} for sides in decayed]
    if len(known) != 2 or any(len(sides) > 1 for sides in decayed) or in_order != sorted(in_order):
        raise StateError(
            f"{directory}: {len(known)} param groups with other options lie in {len(shapes)} sub-groups, and the "
            "files do not say which in which: expected Trainer's groups with and without decay"
        )
    return [known[0] if sides == {True} else known[1] for sides in decayed]


def _cut_all(
    where: Path, names: Mapping, pieces: Sequence[Tensor], padding: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: the ranks' pieces in a row are the parameters in a row, each with its padding."""
    whole, first = torch.cat([piece.flatten() for piece in pieces]), 0
    for (name, shape), unused in zip(names.items(), padding, strict=True):
        yield name, _shaped(where, name, shape, whole[first : first + shape.numel()])
        first += shape.numel() + unused


def _cut_each(
    where: Path, names: Mapping, pieces: Sequence[Tensor], _padding: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: every rank has its share of each parameter, rounded up."""
    first = 0
    for name, shape in names.items():
        share = math.ceil(shape.numel() / len(pieces))
        whole = torch.cat([piece.flatten()[first : first + share] for piece in pieces])
        yield name, _shaped(where, name, shape, whole[: shape.numel()])
        first += share
    if first != pieces[0].numel():
        raise StateError(
            f"{where}: expected {first} values of a rank, got {pieces[0].numel()}: files of several saves?"
        )


def _shaped(where: Path, name: str, shape: torch.Size, values: Tensor) -> Tensor:
    if values.numel() != shape.numel():
        raise StateError(
            f"{where}: {name}: expected {shape.numel()} values, got {values.numel()}: files of several saves?"
        )
    return values.view(shape)


class _Empty:
    """Stands for an object of DeepSpeed, of which nothing is needed."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _load(file: Path) -> dict:
    # A damaged file makes the reader raise almost anything.
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        empty: list = [(_Empty, name) for name in foreign if name.startswith("deepspeed.")]
        with torch.serialization.safe_globals(empty):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise StateError(f"{file}: cannot be read as plain tensors ({first_line(error)}): save it again") from error
    if not isinstance(saved, dict):
        raise StateError(f"{file}: expected a dict, got {type(saved).__name__}")
    return saved
