"""What is proved of a model and of its losses before the first candidate is scored, and on which rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from montessori.apart import Apart, captured_as_alone, proved_rows
from montessori.batching import Example, spread
from montessori.coverage import (
    failures_named,
    leave_all,
    prove_head,
    proved_loss,
    verified_plan,
    with_gradient,
)
from montessori.holdings import held_modules
from montessori.live import undisturbed
from montessori.losses import LossFunction, response_loss
from montessori.parameters import trainable_parameters
from montessori.passes import evaluation_mode, gradients_aside
from montessori.referenceset import PROOF_TOKENS, ReferenceSets, shortest, telling
from montessori.rules import Plan

# Candidates among which a loss of the user's own finds two with a gradient.
PROVERS = 8


@dataclass
class Proofs:
    """`references` are taken one row at a time once it is found that they must be. `backend` as of the estimator."""

    model: nn.Module
    references: ReferenceSets
    loss: LossFunction
    reference_loss: LossFunction
    backend: str
    _provers: Sequence[Example] = ()
    _longest: Example | None = None
    _plan: Plan | None = None
    _rows_proved: bool = False
    _has_gradient: bool = False
    _apart: Apart = field(default_factory=Apart)
    _companions: list[nn.Module] | None = None

    @property
    def own_loss(self) -> bool:
        """Whether the loss of candidates is one of the user's own."""
        return self.loss is not response_loss

    def meet(self, candidates: Sequence[Example]) -> None:
        """Where one of the losses is the user's own, rows of the other kind may not do for a proof: the loss of
        candidates is proved on the first that come, and again on the first of another length, since examples of one
        length show neither padding nor, alone, mixing. Otherwise on references, and on a candidate where all of them
        are shorter than it and than a window: a model may take another way with longer texts."""
        if not candidates:
            return
        if not (self.own_loss or self.reference_loss is not response_loss):
            shown = self._longest or self.references.telling()[0]
            longest = telling([shown, *candidates])[0]
            if min(longest.num_tokens, PROOF_TOKENS[0]) > shown.num_tokens:
                self._longest, self._plan = longest, None
            return
        known = self._provers
        some = telling([*known, *candidates])
        if len(some) > len(known) or _num_lengths(some) > _num_lengths(known):
            self._provers = [*some, *(spread(candidates, PROVERS) if self.own_loss else ())]
            self._plan = None

    def forget_plan(self) -> None:
        """Of a model that has changed nothing is known, of its batches neither."""
        self._plan, self._apart = None, Apart()

    def plan(self) -> Plan:
        """How gradients are captured, as `verified_plan` found it."""
        if self._plan is None:
            examples = self._examples()
            with failures_named():
                prove_head(self.model, shortest(examples), self.loss)
                self.references.check_shortest(self.model, self.reference_loss)
                self._plan = verified_plan(self.model, examples, self.loss, self._longest)
        return self._plan

    def prove_rows(self, full: nn.Module) -> None:
        """`proved_rows` once; `full` is the model or its float32 copy."""
        if not self._rows_proved:
            losses = self.reference_loss, self.loss
            self.references = proved_rows(self.model, full, self.references, *losses, self._examples())
            self._rows_proved = True

    def check_gradient(self) -> None:
        """Raise UntrainedLossError where no real step would have a gradient; of a prediction, its plan tells."""
        if self.own_loss and not self._has_gradient:
            parameters = trainable_parameters(self.model)
            with undisturbed(parameters):
                with_gradient(self.model, parameters, self._provers, self.loss)
            self._has_gradient = True

    def batches(self, batches: Sequence[Sequence[Example]], full: nn.Module) -> Sequence[Sequence[Example]]:
        """`Apart.apart` of the batches of one call. What rows do to each other in a loss of the user's own may be less
        than a narrow model rounds."""
        plan = self.plan()
        as_alone = partial(captured_as_alone, self.model, plan, self.loss)
        apart = batches
        if not plan.per_example:
            apart = self._apart.apart(full if self.own_loss else self.model, batches, self.loss, as_alone)
        by_rules, singly = plan.fallback != plan.trainable.keys(), plan.per_example or apart is not batches
        if by_rules and singly and not self._apart.singles_as_alone(batches, self.loss, as_alone):
            leave_all(plan)
        return apart

    @contextmanager
    def companions_aside(self) -> Iterator[None]:
        """Modules that the user's losses hold, such as a teacher, in eval mode, without gradients, and their owner's
        again outside."""
        if self._companions is None:
            own = set(self.model.modules())
            losses = [loss for loss in (self.loss, self.reference_loss) if loss is not response_loss]
            held = [module for loss in losses for module in held_modules(loss)]
            self._companions = [module for module in dict.fromkeys(held) if module not in own]
        with ExitStack() as stack:
            for module in self._companions:
                stack.enter_context(evaluation_mode(module))
            owned = {id(parameter) for parameter in self.model.parameters()}
            parameters = (parameter for module in self._companions for parameter in module.parameters())
            unique = {id(parameter): parameter for parameter in parameters if id(parameter) not in owned}
            stack.enter_context(gradients_aside(unique.values()))
            yield

    def chunked_reference_loss(self, full: nn.Module) -> LossFunction:
        """The reference's loss with the vocabulary head by chunks, where that is proved."""
        return proved_loss(full, self.references.shortest(), self.reference_loss, self.backend)

    def _examples(self) -> Sequence[Example]:
        return self._provers or self.references.telling()


def _num_lengths(examples: Sequence[Example]) -> int:
    return len({example.num_tokens for example in examples})
