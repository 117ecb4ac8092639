"""What a pass over a batch rests on: losses that are checked, and a model that is left as its owner holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from montessori.batching import Batch
from montessori.errors import ModelError, MontessoriError, StateError, UntrainedLossError
from montessori.losses import LossFunction, response_loss
from montessori.quantised_layers import quantised_layers
from montessori.strangers import leaves_below, look_for_strangers
from montessori.wording import clipped

# What a RuntimeError says where memory ran out: torch's allocators, its check of a call of CUDA, the CUDA kernels'
# runtime, Triton's driver, and torch's stable interface, which keeps the allocator's own words from an operator.
MEMORY_ERRORS = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    "Triton Error [CUDA]: out of memory",
    '"aten::new_empty", "", stack.data()',
)


# Names of trainable parameters that are held fixed, since the optimizer has no moments of them (`montessori.idle`).
HELD_FIXED: ContextVar[frozenset[str]] = ContextVar("held_fixed", default=frozenset())


def example_losses(model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """The loss function's result, checked to be one differentiable value per example [B]."""
    own = loss is not response_loss and any(batch.rows)
    try:
        with _fixed_ones_seen(model, batch) as look:
            losses = loss(model, batch)
            look(losses)
    except Exception as error:
        if not own or isinstance(error, MontessoriError) or out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {clipped(error)}"
        raise ModelError(f"the loss function fails for row {batch.named} ({why})") from error
    if not isinstance(losses, Tensor) or losses.shape != (batch.size,):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ModelError(f"the loss function must return one value per example [{batch.size}], got {got}")
    if not losses.is_floating_point():
        raise ModelError(f"the loss function must return floating-point values, got {losses.dtype}")
    if torch.is_grad_enabled() and not losses.requires_grad:
        merged = any(getattr(module, "merged_adapters", None) for module in model.modules())
        why = "; an adapter is merged into the weights, call model.unmerge_adapter()" if merged else ""
        raise UntrainedLossError(f"the loss does not depend on any trainable parameter: nothing to score{why}")
    if torch.is_grad_enabled() and own:
        look_for_strangers(model, losses)
    return losses


@contextmanager
def _fixed_ones_seen(model: nn.Module, batch: Batch) -> Iterator[Callable[[object], None]]:
    """Gives what raises StateError where losses depend on one of HELD_FIXED. They train while the losses are made, so
    that the graph shows them, and get no gradient."""
    names = HELD_FIXED.get()
    if not names or not torch.is_grad_enabled():
        yield lambda losses: None
        return
    fixed = {name: entry for name, entry in model.named_parameters() if name in names}

    def look(losses: object) -> None:
        leaves = {id(leaf) for leaf in leaves_below(losses)} if isinstance(losses, Tensor) else ()
        reached = next((name for name, entry in fixed.items() if id(entry) in leaves), None)
        if reached is not None:
            raise StateError(
                f"{reached} enters the loss of row {batch.named}, though not that of others, "
                "and the optimizer has no moments of it: expected an optimizer that has stepped it; train it first, or "
                "freeze it"
            )

    with ExitStack() as stack:
        for entry in fixed.values():
            entry.requires_grad_(True)
            stack.callback(entry.requires_grad_, False)
        yield look


def out_of_memory(error: Exception) -> bool:
    """Whether memory of the host or of a device ran out; a block's shared memory, which no smaller batch spares, is
    another matter."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(told in text for told in MEMORY_ERRORS)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and the module's training flags put back afterwards, one by one.

    Quantised layers of bitsandbytes stay in training mode, which has no other use for them: out of it the first pass
    rewrites 4-bit weights on a processor into a form whose products have no derivative.
    """
    # Not by `eval`, which some override, to merge an adapter into the weights, say: only flags are put back.
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    for _, module in quantised_layers(model):
        module.training = True
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def gradients_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Parameters without `.grad` inside, with the user's `.grad` again outside. What the user has hung on gradients
    that are ready, such as a step of the optimizer, waits."""
    parameters = list(parameters)
    kept = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        with _hooks_aside(parameters, "_post_accumulate_grad_hooks"):
            yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


def unchanged_gradients(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Inside, gradients of parameters are those of the loss, whatever hooks of the user make of them."""
    return _hooks_aside(list(parameters), "_backward_hooks")


@contextmanager
def _hooks_aside(parameters: Sequence[Tensor], table: str) -> Iterator[None]:
    found = [hooks for parameter in parameters if (hooks := getattr(parameter, table, None))]
    kept = [dict(hooks) for hooks in found]
    try:
        for hooks in found:
            hooks.clear()
        yield
    finally:
        for hooks, before in zip(found, kept, strict=True):
            hooks.update(before)
