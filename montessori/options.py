"""Settings that enter the scores, checked once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from montessori import cpu
from montessori.encoding import INVALID_ROWS, TRUNCATIONS
from montessori.errors import ArgumentError
from montessori.wording import one_line

METHODS = ("anchored", "first_order", "exact")
REFERENCE_DTYPES = ("float32", "model")
DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Options:
    """Settings that enter the scores; see `InfluenceEstimator` for their meaning."""

    method: str
    backend: str
    pilot: int
    max_grad_norm: float | None
    reference_weighting: str
    max_length: int
    truncation: str
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    sample: float
    reference_dtype: str
    invalid_rows: str

    def __post_init__(self) -> None:
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise ArgumentError(f"max_length={self.max_length!r}: expected a positive number of tokens, or None")
        if isinstance(self.pilot, bool) or not isinstance(self.pilot, int) or self.pilot < 0:
            raise ArgumentError(f"pilot={self.pilot!r}: expected a number of examples, 0 for the step with g = 0")
        if self.max_grad_norm is not None and not (_is_number(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ArgumentError(f"max_grad_norm={self.max_grad_norm!r}: expected a positive number, or None")
        check_method(self.method, self.sample, self.reference_dtype, self.backend)
        if self.truncation not in TRUNCATIONS:
            raise ArgumentError(f"truncation={self.truncation!r}: expected one of {', '.join(TRUNCATIONS)}")
        if self.invalid_rows not in INVALID_ROWS:
            raise ArgumentError(f"invalid_rows={self.invalid_rows!r}: expected one of {', '.join(INVALID_ROWS)}")
        # A journal keeps them as JSON, which has no numbers of numpy's.
        for name in ("max_grad_norm", "sample"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_method(method: str, sample: float, reference_dtype: str, backend: str) -> None:
    """Raise ArgumentError for a method that is none, or for what cannot go together."""
    if method not in METHODS:
        raise ArgumentError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if not (_is_number(sample) and 0 < sample <= 1):
        raise ArgumentError(f"sample={sample!r}: expected a share of the weights' tiles, 0 < sample <= 1")
    if sample < 1 and method == "exact":
        raise ArgumentError(f"sample={sample}: method='exact' takes real steps, which cannot be sampled")
    if sample < 1 and backend not in ("auto", "cpu"):
        raise ArgumentError(f"backend={backend!r} with sample < 1: expected 'auto' or 'cpu', nothing else can sample")
    if reference_dtype not in REFERENCE_DTYPES:
        raise ArgumentError(f"reference_dtype={reference_dtype!r}: expected one of {', '.join(REFERENCE_DTYPES)}")
    if reference_dtype == "model" and method != "first_order":
        raise ArgumentError(
            f"reference_dtype='model': method={method!r} takes steps, which a narrow dtype rounds away; "
            "expected method='first_order'"
        )


def check_losses(**losses: object) -> None:
    """Raise ArgumentError for a loss that is no function."""
    for name, loss in losses.items():
        if not callable(loss):
            raise ArgumentError(f"{name}={loss!r}: expected a function of a model and a batch, see docs/losses.md")


def check_kinds(model: object, tokenizer: object, reference_batch_tokens: object, lr: object) -> None:
    """Raise ArgumentError for a name in the place of what it names, and for numbers that are none."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; load it first, for example with "
            "montessori.models.load_model"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise ArgumentError(
            f"tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}; load it first with "
            "AutoTokenizer.from_pretrained"
        )
    check_lr(lr)
    if isinstance(reference_batch_tokens, bool) or not isinstance(reference_batch_tokens, int):
        raise ArgumentError(f"reference_batch_tokens={reference_batch_tokens!r}: expected a number of tokens")
    if reference_batch_tokens < 1:
        raise ArgumentError(f"reference_batch_tokens={reference_batch_tokens}: expected at least 1")


def check_lr(lr: object) -> None:
    """Raise ArgumentError for what is no learning rate that float32 can hold; None is the optimizer's own."""
    if lr is None:
        return
    if isinstance(lr, bool) or not isinstance(lr, Real):
        raise ArgumentError(f"lr={lr!r}: expected one number for all groups, or None for the optimizer's own")
    if not 0 < float(lr) <= torch.finfo(torch.float32).max:
        raise ArgumentError(
            f"lr={lr}: expected a positive number that float32 can hold; leave it out for the optimizer's own"
        )


def check_positions(model: nn.Module, max_length: int) -> None:
    """Raise ArgumentError for more tokens than a model with learned positions has positions for."""
    for name, table in _position_tables(model):
        limit = default_max_length(model, table.num_embeddings)
        if max_length > limit:
            raise ArgumentError(f"max_length={max_length}: expected at most {limit}, the positions that {name} has")


def _position_tables(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Learned positions of text; those of the towers of a model that also takes images or sound do not bound it."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    text = set((decoder if isinstance(decoder, nn.Module) else model).modules())
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module in text and ("position" in last or last == "wpe"):
            yield name, module


def check_sampling(model: nn.Module) -> None:
    """Raise ArgumentError unless the compiled CPU kernels, which alone can sample, take this model's weights."""
    reason = cpu.unsupported(*model.parameters())
    if reason is not None:
        raise ArgumentError(f"sample < 1 needs the compiled CPU kernels: {reason}; pass sample=1")


def resolve_device(name: str = "auto", option: str = "device") -> str:
    """`name`, or for "auto" the GPU if there is one, else the CPU. Raises ArgumentError for what is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    # A build of torch without the device raises AssertionError.
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"{option}={name}: expected auto, cpu or another device that torch can use here ({one_line(error)})"
        ) from error
    return name


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the model's first floating point parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def default_max_length(model: Any, most: int = DEFAULT_MAX_LENGTH) -> int:
    """2048 tokens, or the own limit of the model, or of the model with this config, if that is smaller."""
    config = getattr(model, "config", model)
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if callable(get_text_config) else config
    limits = [getattr(one, "max_position_embeddings", None) for one in (config, text)]
    if isinstance(model, nn.Module):
        limits += [table.num_embeddings for _, table in _position_tables(model)]
    # A number below 1 stands for none (XLNet).
    return min([most, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def steady_length(model: nn.Module) -> int | None:
    """Tokens up to which rotary embeddings do not depend on the length of the batch; None where they never do.

    "longrope" takes other frequencies once a batch is longer than the original context.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return None
    # A model may have one set of parameters for each kind of layer.
    sets = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    moving = [entry for entry in sets if entry.get("rope_type", entry.get("type")) == "longrope"]
    limits = [entry.get("original_max_position_embeddings") or config.max_position_embeddings for entry in moving]
    return min(limits, default=None)
