"""Whether rows that share a batch are scored as each alone, before any is.

They are not where a model looks at later tokens, and so at padding, or where rows meet: in one of its layers, or in a
loss function of the user's own. Such rows are taken one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from montessori.batching import Example, collate
from montessori.capture import Capture
from montessori.copies import check_copy
from montessori.coverage import (
    HEAD_SLACK,
    LOSS_TOKENS,
    NOISE_SHARE,
    TOLERANCE,
    UNREPEATED,
    failures_named,
    missing_inputs_named,
    of_two_lengths,
    prove_head,
    widest,
    window,
)
from montessori.errors import FallbackWarning, ModelError, UntrainedLossError
from montessori.live import undisturbed
from montessori.losses import LossFunction, response_loss
from montessori.norms import NormSink
from montessori.oracle import gradient_norms
from montessori.parameters import trainable_parameters
from montessori.passes import evaluation_mode, example_losses
from montessori.products import unrounded_products
from montessori.referenceset import ReferenceSets, shortest
from montessori.rowmap import UnmappableRowsError
from montessori.rules import Plan

# Rounding allowed in a mean of token losses: 30 layers of float32 show 1.4e-6 for windows of LOSS_TOKENS.
LOSS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Of long ones: beyond them rows that share a batch are not told apart from rows alone.
LONG_TOKENS = 256
# Of their losses: 30 layers of float32 show 4.7e-6, and what is found wrong by mistake costs all rows their batches.
LONG_SLACK = 4
# Of a loss function of the user's own whole batches are compared: rows that meet in it, those of one prompt, say, need
# not be any three.
WHOLE_BATCHES = 4
# Gradients of so many rows of a batch are captured at once, for a comparison of some with their own: a model that has
# its layers see rows in an order of its own, those of one task or length side by side, may do so for many alone.
MOST_ROWS = 64
# Rounding may make that of a norm at most; that of another row is further off.
MOST_SLACK = 0.2


@missing_inputs_named()
def proved_rows(
    model: nn.Module,
    full: nn.Module,
    references: ReferenceSets,
    reference_loss: LossFunction,
    loss: LossFunction,
    examples: Sequence[Example],
) -> ReferenceSets:
    """`proved_references` of `full`, which is the model or a float32 copy of it that is proved to be one.

    `examples` are what `loss` is for.

    Raises ModelError for a forward pass that writes weights (RWKV's first in eval mode), or needs what no row has.
    """
    with undisturbed(trainable_parameters(full)):
        for function, some in ((loss, shortest(examples)), (reference_loss, references.shortest())):
            if full is not model:
                check_copy(model, full, some[0], function)
            if function is not response_loss:
                check_repeats(full, some[0], function)
            prove_head(full, some, function)
        return proved_references(full, references, reference_loss)


@unrounded_products()
def proved_references(model: nn.Module, references: ReferenceSets, loss: LossFunction) -> ReferenceSets:
    """`references`; one row at a time, with a FallbackWarning, where rows of a batch change each other's loss."""
    if references.batch_tokens is None:
        references.check_shortest(model, loss)
        return references
    device = next(model.parameters()).device
    if loss is response_loss:
        examples = sorted((one for group in references.sets.values() for one in group), key=lambda one: one.num_tokens)
        compared: Sequence[Sequence[Example]] = [_ends_and_middle(examples[::-1])]
    else:
        compared = _spread([batch for name in references.sets for batch in references.groups(name, device)])
    if _rows_stand_alone(model, references.shortest(), loss, LOSS_TOKENS) and all(
        _rows_stand_alone(model, some, loss, LONG_TOKENS, LONG_SLACK) for some in compared
    ):
        return references
    warnings.warn(
        "the loss of a reference row depends on what shares its batch (a model that is not causal, or a loss function "
        "that mixes rows): the reference is taken one row at a time, which is slower",
        FallbackWarning,
        stacklevel=6,
    )
    return replace(references, batch_tokens=None)


@dataclass
class Apart:
    """What is known of candidates that share a batch: that rows of up to `tokens` tokens do not change each other's
    loss, that in batches of up to `rows` each gets its own gradient, that rows alone do (`singles`), and, of a loss
    function of the user's own, how many whole `batches` were looked at."""

    tokens: int = 0
    rows: int = 0
    singles: bool = False
    batches: int = 0

    @failures_named()
    @unrounded_products()
    def apart(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Example]],
        loss: LossFunction,
        as_alone: Callable[[Sequence[Example]], bool],
    ) -> Sequence[Sequence[Example]]:
        """`batches`, longest first; or each example by itself, with a FallbackWarning, where rows of a batch change
        each other's loss, or gradients that are captured of them together are not captured `as_alone`."""
        if loss is response_loss:
            alone = self._long_alone(model, batches) and self._captured_alone(batches, as_alone)
        else:
            alone = self._whole_alone(model, batches, loss, as_alone)
        if alone:
            return batches
        warnings.warn(
            f"the losses of candidates of {batches[0][0].num_tokens} tokens, or their gradients, depend on what shares "
            "their batch: candidates are scored one at a time, which is slower",
            FallbackWarning,
            stacklevel=4,
        )
        return [[example] for batch in batches for example in batch]

    def singles_as_alone(
        self,
        batches: Sequence[Sequence[Example]],
        loss: LossFunction,
        as_alone: Callable[[Sequence[Example]], bool],
    ) -> bool:
        """Whether gradients captured of examples by themselves are their own, of which no batch of a proof tells."""
        if not self.singles:
            rows = _ends_and_middle([example for batch in batches for example in batch]) if batches else ()
            windows = [window(one, LOSS_TOKENS) for one in rows] if loss is response_loss else rows
            self.singles = all(as_alone([one]) for one in windows)
        return self.singles

    def _long_alone(self, model: nn.Module, batches: Sequence[Sequence[Example]]) -> bool:
        longest = batches[0] if batches else []
        most = min(longest[0].num_tokens, LONG_TOKENS) if longest else 0
        if len(longest) < 2 or most <= self.tokens:
            return True
        if not _rows_stand_alone(model, _ends_and_middle(longest), response_loss, most, LONG_SLACK):
            return False
        self.tokens = most
        return True

    def _captured_alone(
        self, batches: Sequence[Sequence[Example]], as_alone: Callable[[Sequence[Example]], bool]
    ) -> bool:
        fullest = max(batches, key=len, default=())
        rows = [window(fullest[place], LOSS_TOKENS) for place in _places(len(fullest), MOST_ROWS)]
        if len(rows) < max(2, 2 * self.rows):
            return True
        if not as_alone(rows):
            return False
        self.rows = len(rows)
        return True

    def _whole_alone(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Example]],
        loss: LossFunction,
        as_alone: Callable[[Sequence[Example]], bool],
    ) -> bool:
        for batch in _spread(batches, WHOLE_BATCHES - self.batches):
            if not _rows_stand_alone(model, batch, loss, LONG_TOKENS, LONG_SLACK):
                return False
            if not as_alone([batch[place] for place in _places(len(batch), MOST_ROWS)]):
                return False
            self.batches += 1
        return True


@unrounded_products()
def captured_as_alone(model: nn.Module, plan: Plan, loss: LossFunction, examples: Sequence[Example]) -> bool:
    """Whether gradients captured of `examples` in one batch are, by their norms, autograd's own of some of them alone.

    Also where they cannot be captured in one batch at all, which scoring finds on its own.
    """
    names = plan.trainable
    tolerance = min(MOST_SLACK, UNREPEATED * HEAD_SLACK * widest(TOLERANCE, model))
    with undisturbed(names):
        try:
            squares = _norms(model, plan, loss, examples)
        except (UnmappableRowsError, UntrainedLossError):
            return True
        captured, alike = torch.stack([squares[name] for name in names]).sqrt(), []
        # Not the ends, which many an order of rows leaves where they are.
        for place in sorted({len(examples) // 3, 2 * len(examples) // 3}):
            alone = gradient_norms(model, names, examples[place], loss)
            error = (captured[:, place] - alone).abs()
            # What is not finite is reported by its row.
            alike.append((error <= tolerance * (alone + NOISE_SHARE * alone.norm())) | ~error.isfinite())
    return bool(torch.stack(alike).all())


def _norms(model: nn.Module, plan: Plan, loss: LossFunction, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Squared norms of the captured gradient of every parameter, float64 [B]."""
    device = next(iter(plan.trainable.values())).device
    capture, sink = Capture(model, plan, rows_checked=loss is not response_loss), NormSink(len(examples), device)
    with capture.installed():
        capture.run(collate(examples).to(device), loss, sink)
    return sink.squares


def _ends_and_middle(examples: Sequence[Example]) -> Sequence[Example]:
    """Three of them, or all."""
    return [examples[place] for place in _places(len(examples), 3)]


def _places(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, evenly spread, the first and the last among them."""
    return list(range(count)) if count <= most else [place * (count - 1) // (most - 1) for place in range(most)]


def _spread(batches: Sequence[Sequence[Example]], most: int = WHOLE_BATCHES) -> list[Sequence[Example]]:
    """At most so many of the batches that several examples share."""
    shared = [batch for batch in batches if len(batch) > 1]
    count = min(len(shared), most)
    return [shared[i * len(shared) // count] for i in range(count)]


@torch.no_grad()
def check_repeats(model: nn.Module, example: Example, loss: LossFunction) -> None:
    """Raise ModelError for a loss function of the user's own that gives two values for one example."""
    batch = collate([example]).to(next(model.parameters()).device)
    with evaluation_mode(model):
        first, second = (example_losses(model, batch, loss) for _ in range(2))
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise ModelError(
            f"row {example.index}: the loss function gives {float(first)} and {float(second)}, expected the same value "
            "again; it draws random numbers, or holds a module in train mode"
        )


@torch.no_grad()
def _rows_stand_alone(
    model: nn.Module, examples: Sequence[Example], loss: LossFunction, most: int, slack: float = 1.0
) -> bool:
    """Whether `loss` of windows of `examples`, `most` tokens of each, is the same in one batch as of each alone.

    A loss of the user's own is given them whole.
    """
    windows = examples
    if loss is response_loss:
        windows = of_two_lengths([window(example, most) for example in examples])
    device = next(model.parameters()).device
    with evaluation_mode(model):
        together = example_losses(model, collate(windows).to(device), loss).double()
        alone = torch.cat([example_losses(model, collate([one]).to(device), loss).double() for one in windows])
    # Losses of less than a nat are still differences of logits.
    allowed = slack * widest(LOSS_TOLERANCE, model) * alone.abs().clamp(min=1)
    # What is not finite is reported by its row, when the reference is evaluated.
    return bool((((together - alone).abs() <= allowed) | ~alone.isfinite()).all())
