"""Whether two calls, or the processes of one, would give the same scores: what a journal and `distributed` go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from montessori import calibration, cpu, ops, processes
from montessori.batching import Example
from montessori.encoding import Encoded
from montessori.fingerprint import columns_digest, examples_digest, sets_digest, sums_digest
from montessori.holdings import function_digest, model_digest
from montessori.live import module_numbers
from montessori.losses import LossFunction
from montessori.optim_state import AdamWState
from montessori.options import Options
from montessori.products import float32_precision
from montessori.referenceset import ReferenceSets


@dataclass(frozen=True)
class Call:
    """What the scores of one call depend on, but for the machine."""

    options: Options
    model: nn.Module
    state: AdamWState
    references: ReferenceSets
    loss: LossFunction
    reference_loss: LossFunction
    encoded: Encoded
    pilot: Sequence[Example]

    def fingerprint(self, batches: Sequence[Sequence[Example]], num_processes: int) -> dict[str, Any]:
        """What a journal is kept under, by name."""
        return {
            "options": asdict(self.options),
            "model": model_digest(self.model),
            "optimizer state": self.state.digest(),
            "reference": sets_digest(self.references.sets),
            "candidates": examples_digest(self.encoded.examples),
            "pilot": examples_digest(self.pilot),
            "columns": self._columns(),
            "number of processes": num_processes,
            "batches": [[example.index for example in batch] for batch in batches],
            "loss": function_digest(self.loss),
            "reference loss": function_digest(self.reference_loss),
            "torch": torch.__version__,
            "float32 products": float32_precision(),
            "kernels": [*ops.available_impls(), *calibration.fastest(next(self.model.parameters()).device)],
            # A sample is of this machine's tiles; other machines cut, and so draw, others.
            "tiles": cpu.tiling() if self.options.sample < 1 else None,
        }

    def check_alike(self, method: str, batches: Sequence[Sequence[Example]]) -> None:
        """Raise ArgumentError where a process was given other rows, or holds another model, optimizer or loss."""
        moments = {f"{name} {label}": held for name in self.state for label, held in self.state[name].tensors()}
        weights = dict(chain(self.model.named_parameters(), self.model.named_buffers()))
        processes.check_same({
            "candidates": f"{self.encoded.num_rows} {examples_digest(self.encoded.examples)}",
            "pilot_rows": examples_digest(self.pilot),
            "columns": str(self._columns()),
            "reference": sets_digest(self.references.sets),
            "settings": repr((method, asdict(self.options))),
            "loss": function_digest(self.loss) + function_digest(self.reference_loss),
            "batch_tokens": repr([len(batch) for batch in batches]),
            "model": repr(module_numbers(self.model)) + sums_digest(weights),
            "optimizer": repr([state.step for state in self.state.values()]) + sums_digest(moments),
        })  # fmt: skip

    def _columns(self) -> str | None:
        return columns_digest(chain(self.encoded.examples, self.pilot, *self.references.sets.values()))
