"""The reference loss L(θ) = Σ_r w_r ℓ_r(θ) of K named sets of examples, and its gradient q."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from montessori.batching import BUSY_TOKENS, Batch, Example, collate, make_batches
from montessori.errors import ArgumentError, ModelError, NonFiniteLossError
from montessori.expandable import whole_derivative
from montessori.head import ChunkedLoss
from montessori.losses import LossFunction
from montessori.passes import evaluation_mode, example_losses, gradients_aside, unchanged_gradients

# Tokens of the first example of a proof and of the others: enough to see every kind of mistake, and cheap.
PROOF_TOKENS = (64, 48)
WEIGHTINGS = ("example_mean", "token_mean")


def shortest(examples: Sequence[Example]) -> list[Example]:
    """Up to two examples, of different length where there are such."""
    by_length = sorted(examples, key=lambda example: (example.num_tokens, example.digest()))
    longer = [example for example in by_length[1:] if example.num_tokens > by_length[0].num_tokens][:1]
    return by_length[:1] + (longer or by_length[1:2])


def telling(examples: Sequence[Example]) -> list[Example]:
    """One or two examples for a proof, PROOF_TOKENS long at least and of two lengths where possible."""
    by_length = sorted(examples, key=lambda example: (example.num_tokens, example.digest()))
    first = next((one for one in by_length if one.num_tokens >= PROOF_TOKENS[0]), by_length[-1])
    others = [one for one in by_length if one.num_tokens != first.num_tokens] or by_length[1:2]
    second = [one for one in others if one.num_tokens >= PROOF_TOKENS[1]][:1] or others[-1:]
    return [first, *second]


@dataclass(frozen=True)
class ReferenceSets:
    """K sets of reference examples with weights that sum to 1 within each set.

    `example_mean`: w_r = 1/R. `token_mean`: w_r in proportion to the labelled tokens. `batch_tokens`
    bounds the padded tokens of a batch, None stands for one example at a time; the loss is the same. On a
    processor no batch has more tokens than keep it busy: the gradient needs no more memory than a training step.
    """

    sets: Mapping[str, Sequence[Example]]
    weighting: str
    batch_tokens: int | None

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ArgumentError(f"reference_weighting={self.weighting!r}: expected one of {', '.join(WEIGHTINGS)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sets)

    def weights(self, name: str) -> dict[int, float]:
        """w_r by row number of the set."""
        examples = self.sets[name]
        if self.weighting == "example_mean":
            return {example.index: 1 / len(examples) for example in examples}
        total = sum(example.num_label_tokens for example in examples)
        return {example.index: example.num_label_tokens / total for example in examples}

    def shortest(self) -> list[Example]:
        """`shortest` of all sets."""
        return shortest(self._all())

    def telling(self) -> list[Example]:
        """`telling` of all sets."""
        return telling(self._all())

    def _all(self) -> list[Example]:
        return [example for group in self.sets.values() for example in group]

    @torch.no_grad()
    def check_shortest(self, model: nn.Module, loss: LossFunction) -> None:
        """Raise ModelError naming the row if the loss of one of `shortest` is not finite."""
        device = next(model.parameters()).device
        checked = self.shortest()
        with evaluation_mode(model):
            for name, examples in self.sets.items():
                for example in examples:
                    if any(example is one for one in checked):
                        batch = collate([example]).to(device)
                        _check_values(example_losses(model, batch, loss), batch, name, model)

    @torch.no_grad()
    def loss(self, model: nn.Module, loss: LossFunction, require_finite: bool = True) -> Tensor:
        """L(θ) per set, float64 [K] on the CPU.

        Raises ModelError naming the row whose loss is not finite, unless `require_finite` is off.
        """
        totals = torch.zeros(len(self.sets), dtype=torch.float64)
        with evaluation_mode(model):
            for k, name in enumerate(self.sets):
                for batch, weight in self._weighted_batches(model, name):
                    losses = example_losses(model, batch, loss)
                    if require_finite:
                        _check_values(losses, batch, name, model)
                    totals[k] += (losses.double() * weight).sum().cpu()
        return totals

    def check_reached(self, model: nn.Module, loss: LossFunction) -> None:
        """A pass with gradients over all examples, none of which is taken: for the checks of `example_losses`."""
        with evaluation_mode(model):
            for name in self.sets:
                for batch, _ in self._weighted_batches(model, name):
                    example_losses(model, batch, loss)

    def gradient(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], loss: LossFunction
    ) -> tuple[dict[str, Tensor], Tensor]:
        """q [K, *shape] per parameter in the parameter's dtype, zeros where a set does not reach it; and L(θ) as
        `loss` gives it."""
        q = {
            name: torch.zeros(len(self.sets), *p.shape, dtype=p.dtype, device=p.device)
            for name, p in parameters.items()
        }
        totals = torch.zeros(len(self.sets), dtype=torch.float64)
        for position, set_name in enumerate(self.sets):
            with (
                evaluation_mode(model),
                gradients_aside(parameters.values()),
                unchanged_gradients(parameters.values()),
                whole_derivative(model),
            ):
                for name, parameter in parameters.items():
                    # Backward accumulates straight into q: no second copy of the gradient.
                    parameter.grad = q[name][position]
                for batch, weight in self._weighted_batches(model, set_name):
                    weighted = partial(loss.weighted, weight=weight) if isinstance(loss, ChunkedLoss) else loss
                    losses = example_losses(model, batch, weighted)
                    _check_values(losses, batch, set_name, model)
                    totals[position] += (losses.detach().double() * weight).sum().cpu()
                    (losses * weight.to(losses.dtype)).sum().backward()
                for name, parameter in parameters.items():
                    if parameter.grad is not None and parameter.grad.data_ptr() != q[name][position].data_ptr():
                        q[name][position] = parameter.grad
        return q, totals

    def groups(self, name: str, device: torch.device) -> list[list[Example]]:
        """The batches of a set."""
        examples = self.sets[name]
        if self.batch_tokens is None:
            return [[example] for example in examples]
        most = min(self.batch_tokens, BUSY_TOKENS) if device.type == "cpu" else self.batch_tokens
        return make_batches(examples, max(most, *(example.num_tokens for example in examples)), name)

    def _weighted_batches(self, model: nn.Module, name: str) -> Iterator[tuple[Batch, Tensor]]:
        device = next(model.parameters()).device
        weights = self.weights(name)
        for group in self.groups(name, device):
            weight = [weights[example.index] for example in group]
            yield collate(group).to(device), torch.tensor(weight, dtype=torch.float64, device=device)


def _check_values(losses: Tensor, batch: Batch, name: str, model: nn.Module) -> None:
    """Raises ModelError where losses are narrower than float32 and the weights, whose small steps they would not show,
    and NonFiniteLossError where one is not finite."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & {torch.float32, torch.float64}
    if dtypes and losses.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"reference_loss_fn returns losses in {losses.dtype}, whose rounding hides what a step changes; expected "
            "float32 or float64: compute them from logits.float()"
        )
    bad = (~losses.isfinite()).nonzero().flatten()
    if bad.numel():
        where = name if name == "reference" else f"reference {name}"
        raise NonFiniteLossError(
            f"{where} row {batch.index[int(bad[0])]}: its loss is {float(losses.detach()[bad[0]])}, "
            "expected a finite number; remove the row, or check the model's weights and dtype"
        )
