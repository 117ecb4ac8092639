"""What one optimizer step on each candidate would do to the reference loss."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from montessori import calibration, ops, processes
from montessori.batching import Example, make_batches, one_by_one_beyond, spread
from montessori.collecting import collect
from montessori.copies import full_precision
from montessori.data import is_row
from montessori.encoding import Encoded
from montessori.errors import ArgumentError
from montessori.expandable import check_memory
from montessori.expansion import Expansion, expand_at_anchor, expand_at_theta, real_drift
from montessori.fingerprint import columns_digest, examples_digest
from montessori.idle import Idle, find_idle, read_active
from montessori.journal import ScoreJournal
from montessori.live import Watch, borrowed, own_precision, unwrapped
from montessori.losses import LossFunction, response_loss
from montessori.models import validate_model
from montessori.optim_state import AdamWState
from montessori.optimizers import LiveOptimizer, trained_by
from montessori.options import (
    Options,
    check_kinds,
    check_losses,
    check_positions,
    check_sampling,
    default_max_length,
    floating_dtype,
    steady_length,
)
from montessori.proofs import Proofs
from montessori.quantised_layers import check_trainable_form
from montessori.reading import RowReader
from montessori.referenceset import ReferenceSets
from montessori.sameness import Call
from montessori.scorers import ExactScorer, LinearScorer, score_batches
from montessori.scores import Audit, Scores
from montessori.strangers import strangers_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Prepared:
    """A scorer and what it found out about the reference before the first candidate, on `full`, the model or a float32
    copy of it."""

    full: nn.Module
    scorer: LinearScorer | ExactScorer
    drift_delta: Tensor
    reference_loss: Tensor
    curvature: Tensor


class InfluenceEstimator:
    """Scores candidates by what one optimizer step on each would do to a reference loss.

    Args:
        model: causal LM (any `nn.Module` with a `loss_fn`); only parameters with `requires_grad` count. The
            wrappers of torch.compile, DataParallel and DistributedDataParallel are taken off. Weights, gradients, modes
            and hooks are as before after every call, bit for bit; it computes in its own dtype whatever autocast is on.
        optimizer: the state that the step starts from: a live `torch.optim.AdamW`, `Adam` or `SGD`, several in a
            list, a checkpoint directory (Trainer, TRL, accelerate), or an `AdamWState`. A live one may go on training
            between calls: every call scores the step that it would take now; an `AdamWState` read from it before is
            refused then.
        reference: rows, a dataset or a path; or a dict (also a DatasetDict) of several, scored together as K named
            sets: influence then has a column for each.
        method: "anchored" (Eq. 4), "first_order" (Eq. 3) or "exact" (Eq. 2, real steps).
        backend: implementation of `montessori.ops`, "auto" or one of `montessori.ops.available_impls()`. The first
            "auto" on a GPU in bfloat16 or float16 measures which is fastest there, once (`montessori.calibration`).
        lr: takes the place of the optimizer's own in every group.
        tokenizer: needed for rows of text; rows with `input_ids` and `labels` do without.
        max_length: tokens an example may have; by default 2048 or the model's own limit if smaller.
        truncation: what happens to longer ones: "error", "right" (cut the end) or "skip".
        invalid_rows: candidates that are no example (no answer, columns missing): "error", or "skip" with their
            status "invalid" and the reason in `Scores.info`; of the reference they are errors.
        chat_template, chat_template_kwargs: see `montessori.encoding.encode_rows`.
        pilot: number of candidates whose mean step is the anchor; 0 anchors at the step with g = 0.
            They are chosen by content, so the order of the candidates does not matter.
        sample: share of each weight's tiles to score, 1 for all. Less is faster and gives unbiased estimates
            with `Scores.standard_error`; the tiles of a layer are the same for all candidates, those of the
            head for all whose logits are cut alike. Needs the compiled kernels.
        max_grad_norm: clipping by global norm as the training run would apply it, without the 1e-6 that torch adds to
            the norm; None for none.
        reference_weighting: "example_mean" (w_r = 1/R) or "token_mean".
        reference_dtype: of the reference gradient. "float32" takes it on a float32 copy of a narrower model; "model"
            makes no copy and needs method="first_order", which takes no step that the model's dtype could not hold.
        reference_batch_tokens: padded tokens per batch of the reference, at most 1,024 on a processor; same loss.
        loss_fn, reference_loss_fn: (model, Batch) -> [B], by default mean token losses; others see whole rows and
            are held to what docs/losses.md says.

    Raises ModelError, StateError, DataError or ArgumentError, each one line that says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: LiveOptimizer | AdamWState | str | os.PathLike[str],
        reference: Any,
        method: str = "anchored",
        backend: str = "auto",
        *,
        lr: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        truncation: str = "error",
        invalid_rows: str = "error",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        pilot: int = 8,
        sample: float = 1.0,
        max_grad_norm: float | None = None,
        reference_weighting: str = "example_mean",
        reference_dtype: str = "float32",
        reference_batch_tokens: int = 4096,
        loss_fn: LossFunction = response_loss,
        reference_loss_fn: LossFunction = response_loss,
    ) -> None:
        check_kinds(model, tokenizer, reference_batch_tokens, lr)
        check_losses(loss_fn=loss_fn, reference_loss_fn=reference_loss_fn)
        self.model = model = unwrapped(model)
        validate_model(model)
        self.options = Options(
            method=method,
            backend=ops.check_impl(backend, "backend"),
            pilot=pilot,
            max_grad_norm=max_grad_norm,
            reference_weighting=reference_weighting,
            max_length=default_max_length(model) if max_length is None else max_length,
            truncation=truncation,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            sample=sample,
            reference_dtype=reference_dtype,
            invalid_rows=invalid_rows,
        )
        if method != "exact":
            check_memory(model)
        check_positions(model, self.options.max_length)
        if sample < 1:
            check_sampling(model)
        self._loss, self._reference_loss = loss_fn, reference_loss_fn
        own, own_reference = (loss is not response_loss for loss in (loss_fn, reference_loss_fn))
        self._reader = RowReader(model, tokenizer, self.options, own, own_reference)
        self._optimizer, self._lr = optimizer, lr
        self._named = isinstance(reference, Mapping) and not is_row(reference)
        named = reference if self._named else {"reference": reference}
        if not named:
            raise ArgumentError("reference={}: expected at least one named set of rows, got none")
        if not all(isinstance(name, str) for name in named):
            raise ArgumentError(f"reference: expected names of sets as text, got {', '.join(map(repr, named))}")
        sets = {name: self._reader.reference(rows, name) for name, rows in named.items()}
        self._steady = steady_length(model)
        longest = max(example.num_tokens for examples in sets.values() for example in examples)
        # Some models (Gemma 2) compute their norms in float32 whatever their dtype. In float64, the
        # precision of checks, their sums must not depend on what shares a batch.
        alone = floating_dtype(model) is torch.float64 or (self._steady is not None and longest > self._steady)
        references = ReferenceSets(sets, reference_weighting, None if alone else reference_batch_tokens)
        self._proofs = Proofs(model, references, loss_fn, reference_loss_fn, self.options.backend)
        self.state, self._idle = self._read_optimizer()
        self._watch = Watch(model, optimizer)
        self._expansions: dict[str, Expansion] = {}
        if method != "exact" and backend == "auto":
            calibration.ensure(parameter for parameter in model.parameters() if parameter.requires_grad)

    @property
    def references(self) -> ReferenceSets:
        """The reference, tokenised."""
        return self._proofs.references

    @property
    def coverage(self) -> dict[str, int]:
        """Scalars per capture rule, without those held fixed; `autograd` counts those of the per-example fallback."""
        with self._at_work():
            return self._proofs.plan().coverage()

    def read(self, candidates: Any, *, progress: bool = False) -> Encoded:
        """The candidates, tokenised: what `prepare`, `score` and `audit` of this estimator take in their place, so that
        rows that are given to several are read once."""
        return self._reader.read(candidates, "candidates", progress=progress)

    def prepare(self, candidates: Any) -> None:
        """Compute what is shared by all candidates now: the proof of the capture, the anchor and q.

        `score` does it on its own; the result is kept as long as the pilot examples stay the same.
        """
        pilot = self._chosen(self.read(candidates))
        with self._at_work():
            self._prepare(self.options.method, pilot)

    def score(
        self,
        candidates: Any,
        *,
        batch_tokens: int = 4096,
        progress: bool = False,
        journal: ScoreJournal | None = None,
        distributed: bool = False,
        pilot_rows: Any = None,
    ) -> Scores:
        """Scores of all candidates in input order.

        `candidates`: rows, a dataset, a path, or what `read` made of them. `batch_tokens` bounds the padded tokens of a
        batch and with them memory; it does not change the scores beyond rounding. `journal` keeps finished batches on
        disk and lets a killed run go on. Candidates that cannot be scored are reported in `Scores.status`, the others
        are scored. With `distributed` the processes of `torch.distributed` share the candidates: all call this, each
        with a journal of its own, and return all scores. `pilot_rows`: what the pilot examples are chosen from, if not
        these candidates: one anchor for rows of several calls.
        """
        if journal is not None and not isinstance(journal, ScoreJournal):
            raise ArgumentError(f"journal: expected a ScoreJournal, got {type(journal).__name__}: ScoreJournal(path)")
        # With an anchor from elsewhere, a piece of rows may be nothing but such as are skipped.
        encoded = self._reader.read(candidates, "candidates", pilot_rows is not None, progress)
        pilot = self._chosen(encoded)
        if pilot_rows is not None:
            pilot = self._chosen(self._reader.read(pilot_rows, "pilot_rows"))
        size = (
            batch_tokens if self.options.method != "exact" else max((e.num_tokens for e in encoded.examples), default=1)
        )
        batches = make_batches(encoded.examples, size)
        if self.options.method == "exact":
            batches = [[example] for batch in batches for example in batch]
        elif self._steady is not None:
            batches = one_by_one_beyond(batches, self._steady)
        with self._at_work():
            return self._score(encoded, batches, self.options.method, progress, journal, pilot, distributed)

    def audit(self, candidates: Any, k: int = 16, *, progress: bool = False) -> Audit:
        """Predictions for `k` candidates against real float32 steps on the same ones.

        The sample is spread evenly over the candidates in an order given by their content.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ArgumentError(f"k={k!r}: expected a number of candidates, 2 at least")
        encoded = self.read(candidates, progress=progress)
        sample = spread(encoded.examples, k)
        if len(sample) < 2:
            raise ArgumentError(f"audit: expected at least 2 candidates that can be scored, got {len(sample)}")
        part = Encoded(sample, {}, [], encoded.num_rows)
        singles = [[example] for example in sample]
        pilot = self._chosen(encoded)
        with self._at_work():
            predicted = self._score(part, singles, self.options.method, progress, None, pilot)
            real = self._score(part, singles, "exact", progress, None, pilot)
        return Audit.of(predicted, real, [example.index for example in sample])

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Everything in the weights' own precision; what was computed before the owner trained on is forgotten."""
        with (
            borrowed(self.model),
            own_precision(self.model),
            self._proofs.companions_aside(),
            strangers_aside(trained_by(self._optimizer)),
        ):
            check_trainable_form(self.model)
            if isinstance(self._optimizer, AdamWState):
                self._optimizer.check_current()
            fixed, moved = self._watch.changes()
            if fixed or moved:
                validate_model(self.model)
                idle_before = self._idle.parameters.keys()
                if fixed or not isinstance(self._optimizer, str | os.PathLike):
                    self.state, self._idle = self._read_optimizer()
                if fixed or self._idle.parameters.keys() != idle_before:
                    self._proofs.forget_plan()
                self._expansions.clear()
                self._watch.accept()
            # Parameters that some candidates do not reach, of which a call warns once.
            self._told: set[str] = set()
            try:
                with self._idle.held():
                    yield
            finally:
                self._watch.settle()

    def _read_optimizer(self) -> tuple[AdamWState, Idle]:
        example = self.references.shortest()[0]
        return read_active(
            self._optimizer, self.model, self._lr, lambda: find_idle(self.model, example, self._reference_loss)
        )

    def _score(
        self,
        encoded: Encoded,
        batches: Sequence[Sequence[Example]],
        method: str,
        progress: bool,
        journal: ScoreJournal | None,
        pilot: Sequence[Example],
        distributed: bool = False,
    ) -> Scores:
        if distributed:
            if processes.world_size() > 1:
                self._call(encoded, pilot).check_alike(method, batches)
            # The longest stand first, so that every process gets long and short ones.
            batches = batches[processes.rank() :: processes.world_size()]

        def share() -> tuple[list[dict[str, Any]], dict[str, Any]]:
            if journal is None:
                return self._pending(batches, method, progress, None, pilot)
            num_processes = processes.world_size() if distributed else 1
            with journal.opened(self._call(encoded, pilot).fingerprint(batches, num_processes)):
                return self._pending(batches, method, progress, journal, pilot)

        done = processes.all_do(share) if distributed else [share()]
        records = [record for records, _ in done for record in records]
        # The same on all.
        return collect(encoded, records, done[0][1], method, self.options, self.references.names, self._named)

    def _call(self, encoded: Encoded, pilot: Sequence[Example]) -> Call:
        losses = self._loss, self._reference_loss
        return Call(self.options, self.model, self.state, self.references, *losses, encoded, pilot)

    def _pending(
        self,
        batches: Sequence[Sequence[Example]],
        method: str,
        progress: bool,
        journal: ScoreJournal | None,
        pilot: Sequence[Example],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Records of all batches, scored now unless they stand in the `journal`, and the summary."""
        done = [] if journal is None else journal.records
        finished = {index for record in done for index in record.get("index", [])}

        def left() -> list[list[Example]]:
            rest = ([example for example in batch if example.index not in finished] for batch in batches)
            return [batch for batch in rest if batch]

        records = [record for record in done if "index" in record]
        summary = next((record for record in done if "drift" in record), None)
        if left() or summary is None:
            prepared = self._prepare(method, pilot)
            if method != "exact":
                # Judged on all batches, not on what is left: a resumed run decides as the first one did.
                batches = self._proofs.batches(batches, prepared.full)
            summary = summary or _summary(prepared)
            if journal is not None and summary not in done:
                journal.append(summary)
            records += score_batches(prepared.scorer, left(), journal, progress)
        return records, summary

    def _prepare(self, method: str, pilot: Sequence[Example]) -> _Prepared:
        narrow = self.options.reference_dtype == "model" and method != "exact"
        full = self.model if narrow else full_precision(self.model)
        self._proofs.prove_rows(full)
        if method == "exact":
            self._proofs.check_gradient()
            # The truth of an audit has the bits of the real optimizer.
            impl = self.options.backend if self.options.method == "exact" else "reference"
            of_reference = self._reference_loss if impl == "reference" else self._proofs.chunked_reference_loss(full)
            if self._idle.parameters:
                self.references.check_reached(full, self._reference_loss)
            delta, loss = real_drift(full, self.state, self.references, of_reference, impl)
            scorer = ExactScorer(
                full,
                self.state,
                self.references,
                self._loss,
                of_reference,
                self.options.max_grad_norm,
                loss,
                impl,
                self._told,
            )
            return _Prepared(full, scorer, delta, loss, torch.zeros_like(loss))
        plan = self._proofs.plan()
        expansion = self._expand(full, method, pilot)
        linear = LinearScorer(
            self.model,
            plan,
            self.state,
            expansion,
            self._loss,
            self.options.backend,
            self.options.max_grad_norm,
            self.options.sample,
            self._told,
        )
        return _Prepared(full, linear, expansion.drift_delta, expansion.loss, expansion.curvature)

    def _expand(self, full: nn.Module, method: str, pilot: Sequence[Example]) -> Expansion:
        key = f"{method}:{examples_digest(pilot)}:{columns_digest(pilot)}"
        if key not in self._expansions:
            self._expansions.clear()
            reference_loss = self._proofs.chunked_reference_loss(full)
            common = (full, self.state, self.references, reference_loss, self.options.backend)
            self._expansions[key] = (
                expand_at_theta(*common)
                if method == "first_order"
                else expand_at_anchor(*common, pilot, self._loss, self.options.max_grad_norm)
            )
        return self._expansions[key]

    def _chosen(self, encoded: Encoded) -> list[Example]:
        """The pilot examples."""
        self._proofs.meet(encoded.examples)
        return spread(encoded.examples, self.options.pilot)


def _summary(prepared: _Prepared) -> dict[str, Any]:
    return {
        "drift": (-prepared.drift_delta).tolist(),
        "reference_loss": prepared.reference_loss.tolist(),
        "curvature": prepared.curvature.tolist(),
    }
