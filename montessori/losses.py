"""The loss of a training example and of a reference example: two functions a user may replace.

Both have the signature `loss(model, batch: Batch) -> Tensor [B]`: the mean token loss over the labelled
tokens of each example (ℓ_i and ℓ_r of docs/equations.md), connected to the graph. What is expected of others is in
docs/losses.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from montessori.batching import IGNORE_INDEX, Batch
from montessori.errors import ModelError

LossFunction = Callable[[nn.Module, Batch], Tensor]
# Heads of models that compute something by position with the logits.
_ON_ALL_POSITIONS: WeakSet[nn.Module] = WeakSet()


def label_rows(batch: Batch) -> Tensor:
    """Flat positions b·T + t, int64 [n], of hidden states whose next token carries a label."""
    labelled = torch.zeros_like(batch.labels, dtype=torch.bool)
    labelled[:, :-1] = batch.labels[:, 1:] != IGNORE_INDEX
    return labelled.flatten().nonzero().flatten()


def response_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labelled tokens of each example, [B], float64 sums of token losses.

    The vocabulary head runs on the labelled positions alone where the model has a head module that
    takes hidden states [B, T, H]. Raises ModelError when the model returns something else than logits.
    """
    rows = label_rows(batch)
    with _head_on(model, rows, batch.labels.shape):
        output = model(**model_inputs(model, batch))
    return _response_loss(model, batch, rows, output)


def response_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log π of the labelled tokens of each example, summed, float64 [B]; for losses that give the model several texts.

    The vocabulary head runs on as many positions of each example as the one with most labels has. Errors as
    `response_loss`.
    """
    rows, length = label_rows(batch), batch.labels.shape[1]
    counts = torch.bincount(rows // length, minlength=batch.size)
    counted = torch.arange(int(counts.max()), device=rows.device) < counts[:, None]
    # Where there are fewer, the example's own first token stands in.
    firsts = torch.arange(batch.size, device=rows.device) * length
    positions = firsts[:, None].expand(counted.shape).masked_scatter(counted, rows)
    with _head_on(model, positions, batch.labels.shape):
        logits = _logits(model, model(**model_inputs(model, batch)))
    if logits.shape[:2] == batch.labels.shape:
        logits = logits.reshape(-1, logits.shape[-1])[positions]
    if logits.shape[:2] != positions.shape:
        raise _shifted(model, logits)
    targets = batch.labels.flatten()[positions + 1].where(counted, 0)
    token_loss = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none").double()
    return -token_loss.view(counted.shape).where(counted, 0.0).sum(1)


def prove_packing(model: nn.Module, batch: Batch) -> None:
    """Remember to run the head of this model on all positions, if its output changes when the others are left out."""
    head = _head(model)
    if head is None or head in _ON_ALL_POSITIONS:
        return
    with torch.no_grad():
        want = _response_loss(model, batch, label_rows(batch), model(**model_inputs(model, batch)))
        try:
            got = response_loss(model, batch)
        except (RuntimeError, ValueError, IndexError):
            got = torch.full_like(want, torch.nan)
    # The products of fewer rows may be summed in another order.
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    allowed = 64 * eps * want.abs().clamp(min=1)
    if bool(((got - want).abs() > allowed).any() | (got.isnan() & ~want.isnan()).any()):
        _ON_ALL_POSITIONS.add(head)


def _response_loss(model: nn.Module, batch: Batch, rows: Tensor, output: object) -> Tensor:
    logits = _logits(model, output)
    if logits.shape[:2] == batch.labels.shape and logits.shape[:2] != (1, rows.numel()):
        logits = logits.reshape(-1, logits.shape[-1])[rows]
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[0] != targets.numel():
        raise _shifted(model, logits)
    token_loss = F.cross_entropy(_wide(logits), targets, reduction="none").double()
    example = rows // batch.labels.shape[1]
    count = torch.zeros(batch.size, dtype=torch.float64, device=rows.device)
    count.index_add_(0, example, torch.ones_like(token_loss))
    return torch.zeros_like(count).index_add(0, example, token_loss) / count


def _logits(model: nn.Module, output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ModelError(
            f"{type(model).__name__} returned no logits: pass loss_fn= and reference_loss_fn= for this model"
        )
    return logits


def _shifted(model: nn.Module, logits: Tensor) -> ModelError:
    return ModelError(
        f"{type(model).__name__} returned logits of shape {list(logits.shape)}, which are not those of the tokens that "
        "have labels: a model that adds positions of its own (prompt tuning) needs loss_fn= and reference_loss_fn="
    )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, object]:
    """Keyword arguments for the model's forward: token ids; positions are the model's own, which need not start at 0.

    The attention mask is all ones: padding stands on the right, where causal attention never looks, and
    masking it would leave padding rows with nothing to attend to (NaN in models with a sliding window).
    A model that is not causal is found by `montessori.coverage` before anything is scored.
    """
    accepted = _forward_arguments(type(model).forward)
    inner = getattr(model, "get_base_model", None)
    if inner is not None:
        accepted = _forward_arguments(type(inner()).forward)
    inputs: dict[str, object] = {"input_ids": batch.input_ids}
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(batch.input_ids)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


@lru_cache(maxsize=64)
def _forward_arguments(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextmanager
def _head_on(model: nn.Module, rows: Tensor, shape: torch.Size) -> Iterator[None]:
    """While active, the output embedding sees hidden states [1, n, H] of `rows` [n] only, or [B, n, H] of [B, n]."""
    head = _head(model)
    if head is None or head in _ON_ALL_POSITIONS:
        yield
        return

    def select(_module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != shape:
            return None
        return (hidden.reshape(-1, hidden.shape[-1])[rows if rows.dim() == 2 else rows[None]], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
