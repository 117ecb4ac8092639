"""Optimizers of bitsandbytes and torchao as torch would hold them, 8-bit moments as float32.

Both step from the moments before they are quantised again, in float32 and by Eq. 1, so their next step is that of
torch's AdamW from the dequantised state. bitsandbytes decays weights apart from the gradient in Adam too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from montessori.errors import ArgumentError

_NAME = re.compile(r"(Paged)?AdamW?(4bit|8bit|32bit|Fp8)?")
# A state dict of bitsandbytes holds here what FSDP must not gather.
_WRAPPED = "__bnb_optimizer_quant_state__"
_MOMENTS = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}
_KNOWN = {"step"} | {key for keys in _MOMENTS.values() for key in keys}
# Values per scale, of bitsandbytes now and in earlier versions.
_BLOCK_SIZES = (256, 2048)
# Settings of a live bitsandbytes optimizer that change its step, with the value that does not.
_PLAIN = {"skip_zeros": False, "max_unorm": 0.0, "percentile_clipping": 100}


def package_of(optimizer: object) -> str | None:
    """ "bitsandbytes" or "torchao" for an Adam or AdamW of theirs, None for any other optimizer."""
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    return package if package in ("bitsandbytes", "torchao") and _NAME.fullmatch(kind.__name__) else None


def is_decoupled(optimizer: Any) -> bool:
    """Whether weight decay of an optimizer that `package_of` knows acts on the weights, not on the gradient."""
    return package_of(optimizer) == "bitsandbytes" or optimizer.is_adamw


def groups_by_parameter(optimizer: Any) -> dict[int, Mapping[str, Any]]:
    """Hyperparameters by `id` of the parameter, with what bitsandbytes was told for single parameters.

    Raises ArgumentError for a setting of bitsandbytes with which the step is another.
    """
    tunable = package_of(optimizer) == "bitsandbytes"
    for name, plain in _PLAIN.items() if tunable else ():
        value = getattr(optimizer.args, name, plain)
        if value != plain:
            raise ArgumentError(f"{type(optimizer).__name__}: {name}={value} is not supported, expected {plain}")
    groups: dict[int, Mapping[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            own = optimizer.get_config(number, place, group) if tunable else {}
            groups[id(parameter)] = {**group, **own}
    return groups


def in_torch_layout(group: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A parameter's group and state with the keys of torch.optim.AdamW; both as they are where they are torch's.

    Raises ArgumentError for the state of another optimizer of bitsandbytes.
    """
    entry = {**entry, **entry.get(_WRAPPED, {})}
    entry.pop(_WRAPPED, None)
    if "state1" not in entry and "t_alpha" not in group:
        return group, {key: _from_torchao(value) for key, value in entry.items()}
    group = {**group, "amsgrad": False}
    if not entry:
        return group, entry
    foreign = sorted(entry.keys() - _KNOWN)
    if foreign or "state2" not in entry or group.get("alpha") or len(group["betas"]) != 2:
        raise ArgumentError(
            f"expected the state of Adam or AdamW of bitsandbytes, blockwise, got keys {', '.join(sorted(entry))} and "
            f"betas {tuple(group['betas'])}"
        )
    moments = {
        name: _from_bitsandbytes(entry[state], entry.get(table), entry.get(scales))
        for name, (state, table, scales) in _MOMENTS.items()
    }
    return group, {"step": entry["step"], **moments}


def _from_bitsandbytes(state: Tensor, table: Tensor | None, scales: Tensor | None) -> Tensor:
    """float32 moments of codes uint8 into `table` [256], each block of them with a scale."""
    if state.dtype != torch.uint8:
        return state
    if table is None or scales is None:
        raise ArgumentError("8-bit codes without qmap and absmax: expected the whole state")
    size = next((size for size in _BLOCK_SIZES if -(-state.numel() // size) == scales.numel()), None)
    if size is None:
        raise ArgumentError(
            f"absmax of {scales.numel()} blocks for {state.numel()} codes: expected blocks of "
            f"{' or '.join(map(str, _BLOCK_SIZES))}"
        )
    values = table.float()[state.flatten().int()]
    values *= scales.float().repeat_interleave(size)[: values.numel()]
    return values.reshape(state.shape)


def _from_torchao(value: Any) -> Any:
    quantised = isinstance(value, Tensor) and type(value).__module__.startswith("torchao.")
    return value.dequantize(torch.float32) if quantised else value
