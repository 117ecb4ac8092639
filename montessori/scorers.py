"""The two ways to get ΔL of candidates: the linear prediction (Eq. 3, 4) and the real step (Eq. 2).

A scorer is made once per run and is asked, within `running()`, for one group of candidates after the other:
`score` gives ΔL and the candidates' own losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from montessori.bars import progress_bar
from montessori.batching import Batch, Example, collate
from montessori.capture import Capture
from montessori.cpu import TileSample
from montessori.errors import FallbackWarning, IdleWarning, ModelError, ResourceError, UntrainedLossError
from montessori.expansion import Expansion, real_products
from montessori.journal import ScoreJournal
from montessori.live import undisturbed
from montessori.losses import LossFunction, response_loss
from montessori.optim_state import AdamWState
from montessori.oracle import apply_step, candidate_gradients, restore, restored
from montessori.parameters import trainable_parameters
from montessori.passes import example_losses, out_of_memory
from montessori.referenceset import ReferenceSets
from montessori.rowmap import UnmappableRowsError
from montessori.rules import Plan
from montessori.scoring import ClippingSink, InfluenceSink


@dataclass(frozen=True)
class Scored:
    """Of a group: `delta` ΔL float64 [B, K], `loss` its own losses float64 [B], `variance` [B, K] of a sampled ΔL."""

    delta: Tensor
    loss: Tensor
    variance: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        variances = [part.variance for part in parts if part.variance is not None]
        return cls(
            torch.cat([part.delta for part in parts]),
            torch.cat([part.loss for part in parts]),
            torch.cat(variances) if variances else None,
        )

    def record(self) -> dict[str, list]:
        """Plain numbers for a journal."""
        values = {"delta": self.delta, "loss": self.loss, "variance": self.variance}
        return {name: value.tolist() for name, value in values.items() if value is not None}


@dataclass
class LinearScorer:
    """One forward and one backward pass per group, no step taken."""

    model: nn.Module
    plan: Plan
    state: AdamWState
    expansion: Expansion
    loss: LossFunction
    impl: str
    max_grad_norm: float | None
    sample: float
    told: set[str]

    @contextmanager
    def running(self) -> Iterator[None]:
        self._capture = Capture(self.model, self.plan, self.impl, rows_checked=self.loss is not response_loss)
        self._draws: dict[str, TileSample] = {}
        self._cleared: set[str] = set()
        self._device = next(iter(self.plan.trainable.values())).device
        with _unreached(self.told) as self._unreached, undisturbed(self.plan.trainable), self._capture.installed():
            yield

    def score(self, group: Sequence[Example]) -> Scored:
        most = 1 if self.plan.per_example else self.plan.most_examples
        if len(group) > most:
            return Scored.joined([self.score(group[start : start + most]) for start in range(0, len(group), most)])
        try:
            return self._score(group)
        except UnmappableRowsError as error:
            if len(group) == 1:
                raise
            warnings.warn(f"{error}; this batch is scored one example at a time", FallbackWarning, stacklevel=2)
            return Scored.joined([self._score([example]) for example in group])
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        return self._score_halves(group)

    def _score(self, group: Sequence[Example]) -> Scored:
        expansion = self.expansion
        sink = InfluenceSink(
            expansion.q,
            self.state,
            self.plan.trainable,
            expansion.drift,
            self.impl,
            self.sample,
            self._draws,
            self._unreached,
        )
        sink.start(len(group))
        batch = collate(group).to(self._device)
        clipping = None if self.max_grad_norm is None else ClippingSink.before(sink, self.max_grad_norm)
        try:
            losses = self._capture.run(batch, self.loss, clipping or sink)
        except UntrainedLossError:
            if self.loss is response_loss:
                raise
            # No row of the batch has a gradient: all of advantage 0, say.
            for name in self.plan.trainable:
                sink.absent(name)
            with torch.no_grad():
                losses = example_losses(self.model, batch, self.loss)
        else:
            self._check_missing(batch, sink.missing - self.plan.fallback - self._cleared)
        if clipping is not None:
            clipping.release()
        variance = sink.variance.cpu() if self.sample < 1 else None
        return Scored(expansion.constant + sink.scores.cpu(), losses.double().cpu(), variance)

    def _check_missing(self, batch: Batch, names: set[str]) -> None:
        """Raise ModelError for one of `names`, which no hook saw used, that the losses depend on all the same. A name
        is looked for once."""
        past = self._capture.reached(batch, self.loss, names) if names else ()
        if past:
            raise ModelError(
                f"{min(past)} enters the loss of row {batch.named} past the module that holds it, as in no row that "
                "the capture was proved on: its part of the score would be missing; use method='exact'"
            )
        self._cleared |= names

    def _score_halves(self, group: Sequence[Example]) -> Scored:
        tokens = len(group) * max(example.num_tokens for example in group)
        half = len(group) // 2
        if half:
            warnings.warn(
                f"out of memory on a batch of {tokens} tokens: trying it in two halves; lower batch_tokens",
                ResourceWarning,
                stacklevel=2,
            )
            return Scored.joined([self.score(group[:half]), self.score(group[half:])])
        raise ResourceError(f"out of memory on one example of {tokens} tokens: lower max_length")


@dataclass
class ExactScorer:
    """Step, evaluate the reference, restore: the oracle and the honest naive loop."""

    model: nn.Module
    state: AdamWState
    sets: ReferenceSets
    loss: LossFunction
    reference_loss: LossFunction
    max_grad_norm: float | None
    loss_before: Tensor
    impl: str
    told: set[str]

    @contextmanager
    def running(self) -> Iterator[None]:
        self._parameters = trainable_parameters(self.model)
        self._moved_alone: dict[str, bool] = {}
        with (
            _unreached(self.told) as self._unreached,
            real_products(self.model, self.impl),
            restored(self._parameters) as self._saved,
        ):
            yield

    def score(self, group: Sequence[Example]) -> Scored:
        return Scored.joined([self._score(example) for example in group])

    def _score(self, example: Example) -> Scored:
        grads, loss = candidate_gradients(self.model, self._parameters, example, self.loss)
        self._unreached |= {name for name, grad in grads.items() if grad is None and self._moves_alone(name)}
        apply_step(self._parameters, self.state, grads, self.max_grad_norm, self.impl)
        try:
            with undisturbed(self._parameters):
                after = self.sets.loss(self.model, self.reference_loss, require_finite=False)
        finally:
            restore(self._parameters, self._saved)
        return Scored((after - self.loss_before)[None], torch.tensor([loss], dtype=torch.float64))

    def _moves_alone(self, name: str) -> bool:
        """Whether the step with gradient 0 moves a parameter."""
        if name not in self._moved_alone:
            entry, parameter = self.state[name], self._parameters[name]
            parts = [entry.exp_avg, parameter if entry.step.weight_decay else None]
            moves = any(bool(part.any()) for part in parts if part is not None)
            self._moved_alone[name] = moves and entry.step.lr > 0
        return self._moved_alone[name]


@contextmanager
def _unreached(told: set[str]) -> Iterator[set[str]]:
    """Yields a set for the parameters that some candidate does not reach and the state moves, and warns of those that
    the call has not `told` of yet."""
    names: set[str] = set()
    yield names
    new = names - told
    told |= new
    if new:
        warnings.warn(
            f"{min(new)}, one of {len(new)} parameter(s) that some candidates do not reach: taken to have gradient 0 "
            "there, which moves it by momentum and decay as in a batch with others that do; a step on the candidate "
            "alone, after zero_grad(set_to_none=True), would pass over it",
            IdleWarning,
            stacklevel=2,
        )


def score_batches(
    scorer: LinearScorer | ExactScorer,
    batches: Sequence[Sequence[Example]],
    journal: ScoreJournal | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """A record of each batch, as it stands in the journal: `Scored.record` and the numbers of its rows."""
    records = []
    total = sum(example.num_tokens for batch in batches for example in batch)
    with progress_bar("scoring", total, "tok", progress) as bar, scorer.running():
        scored = 0
        for batch in batches:
            scored_batch = scorer.score(batch)
            record = {"index": [example.index for example in batch], **scored_batch.record()}
            if journal is not None:
                journal.append(record)
            records.append(record)
            scored += len(batch)
            rate = scored / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{scored} examples, {rate:.2f} examples/s", refresh=False)
            bar.update(sum(example.num_tokens for example in batch))
    return records
