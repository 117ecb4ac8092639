"""Checkpoints laid out as DeepSpeed 0.19 lays out ZeRO's, from a plain optimizer; with objects of DeepSpeed in them."""

from __future__ import annotations

import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn


@contextmanager
def deepspeed_classes() -> Iterator[tuple[type, type]]:
    """Classes that pickle as those of DeepSpeed, importable only as long as files are written."""

    class LossScaler:
        def __init__(self) -> None:
            self.cur_scale = 1.0

    class ZeroStageEnum(enum.IntEnum):
        gradients = 2

    places = {"deepspeed.runtime.fp16.loss_scaler": LossScaler, "deepspeed.runtime.zero.config": ZeroStageEnum}
    modules = {name: types.ModuleType(name) for name in ("deepspeed", *places)}
    for name, known in places.items():
        known.__module__, known.__qualname__ = name, known.__name__
        setattr(modules[name], known.__name__, known)
    with patch.dict(sys.modules, modules):
        yield LossScaler, ZeroStageEnum


def split(flat: Tensor, ranks: int) -> list[Tensor]:
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * ranks))])
    return [piece.clone() for piece in padded.chunk(ranks)]


def share(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    size = math.ceil(tensor.numel() / ranks)
    flat = torch.cat([tensor.flatten(), tensor.new_zeros(size * ranks - tensor.numel())])
    return flat[rank * size : (rank + 1) * size]


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[parameter]: parameter for parameter in group["params"]} for group in optimizer.param_groups]


def options_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [
        {key: value for key, value in group.items() if key != "params"} | {"params": [number]}
        for number, group in enumerate(optimizer.param_groups)
    ]


def save_stage_2(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: int = 2, padding: int = 0
) -> Path:
    """`padding` values after every parameter, as newer versions may align them."""
    groups = groups_of(model, optimizer)

    def flat(group: dict[str, nn.Parameter], label: str | None) -> list[Tensor]:
        parts = []
        for parameter in group.values():
            tensor = parameter.detach() if label is None else optimizer.state[parameter][label]
            parts += [tensor.flatten(), tensor.new_zeros(padding)]
        return split(torch.cat(parts), ranks)

    masters = [flat(group, None) for group in groups]
    moments = {label: [flat(group, label) for group in groups] for label in ("exp_avg", "exp_avg_sq")}
    for rank in range(ranks):
        state = {
            number: {"step": torch.tensor(2.0)} | {label: pieces[number][rank] for label, pieces in moments.items()}
            for number in range(len(groups))
        }
        optimizer_state = {
            "base_optimizer_state": {"state": state, "param_groups": options_of(optimizer)},
            "single_partition_of_fp32_groups": [pieces[rank] for pieces in masters],
            "partition_count": [ranks] * len(groups),
            "param_alignment_paddings": [[padding] * len(group) for group in groups],
        }
        write(directory, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer_state})
    shapes = [OrderedDict((name, parameter.shape) for name, parameter in group.items()) for group in groups]
    weights = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    write(directory, "mp_rank_00_model_states.pt", {"module": weights, "param_shapes": shapes})
    return directory


def save_stage_3(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: int = 2, sub_group: int = 1000
) -> Path:
    """`sub_group` parameters of a group at most go into one sub-group."""
    parts: list[dict[str, nn.Parameter]] = []
    for group in groups_of(model, optimizer):
        named = list(group.items())
        parts += [dict(named[first : first + sub_group]) for first in range(0, len(named), sub_group)]
    for rank in range(ranks):
        state, masters = {}, []
        for number, part in enumerate(parts):
            masters.append(torch.cat([share(parameter.detach(), ranks, rank) for parameter in part.values()]))
            state[number] = {"step": torch.tensor(2.0)}
            for label in ("exp_avg", "exp_avg_sq"):
                moments = [share(optimizer.state[parameter][label], ranks, rank) for parameter in part.values()]
                state[number][label] = torch.cat(moments)
        optimizer_state = {
            "optimizer_state_dict": {"state": state, "param_groups": options_of(optimizer)},
            "partition_count": ranks,
            "fp32_flat_groups": masters,
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        write(directory, name, {"optimizer_state_dict": optimizer_state})
        shapes = [OrderedDict((name, parameter.shape) for name, parameter in part.items()) for part in parts]
        weights = {name: torch.empty(0) for name, _ in model.named_parameters()}
        write(
            directory,
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            {"module": weights, "param_shapes": shapes},
        )
    return directory


def write(directory: Path, name: str, saved: dict) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with deepspeed_classes() as (loss_scaler, stages):
        extra = {"loss_scaler": loss_scaler(), "zero_stage": stages(2), "ds_version": "0.19.8"}
        if "optimizer_state_dict" in saved:
            saved = {"optimizer_state_dict": saved["optimizer_state_dict"] | extra}
        torch.save(saved | extra, directory / name)
