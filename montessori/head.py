"""The vocabulary head with its cross-entropy, by chunks: the logits of a batch are never held at once.

For one chunk of labelled tokens: logits = h Wᵀ, their cross-entropy, the logits' gradient in their place, its
products with W (dh) and with h (the head's gradient, handed on). The loss of an example is the mean over its
labelled tokens, as in `montessori.losses.response_loss`, so the gradient is known before the backward pass.

Dimensions: B examples, n labelled tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from montessori import gpu, ops
from montessori.batching import IGNORE_INDEX, Batch
from montessori.errors import ModelError
from montessori.losses import label_rows, model_inputs
from montessori.products import add_product_, forward_replaced, is_plain_linear, product
from montessori.rowmap import RowMap
from montessori.rules import LINEAR, ModuleRule
from montessori.uses import LinearUse, ReceivePart, TouchedRows

# Fewest bytes of logits alive at a time: near the caches on a processor, enough work for one launch on a GPU.
LOGITS_BYTES = 64 << 20
GPU_LOGITS_BYTES = 512 << 20
BLOCK_WORDS = 128


class HeadError(ModelError):
    """The model does not use its vocabulary head in the way that chunks need."""


def chunkable_head(model: nn.Module, rules: dict[nn.Module, ModuleRule]) -> nn.Linear | None:
    """The output embedding if it is a plain linear layer, with a weight of its own, that nothing else listens to."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # A weight that is computed when it is read (a parametrization) is another tensor each time.
    if not isinstance(head, nn.Module) or not is_plain_linear(head) or head._parameters.get("weight") is None:
        return None
    listened = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    rule = rules.get(head)
    return None if listened or (rule is not None and rule.kind != LINEAR) else head


def hidden_states(model: nn.Module, head: nn.Linear, batch: Batch) -> Tensor:
    """What the head is given at the labelled positions, [n, H], from a forward pass that leaves it out."""
    rows, caught = label_rows(batch), []

    def catch(hidden: Tensor) -> Tensor:
        if hidden.dim() != 3 or hidden.shape[:2] != batch.labels.shape:
            raise HeadError(f"the vocabulary head was given {list(hidden.shape)}, expected [B, T, H]")
        caught.append(hidden.reshape(-1, hidden.shape[-1])[rows])
        return hidden

    with forward_replaced(head, catch):
        model(**model_inputs(model, batch))
    if len(caught) != 1:
        raise HeadError(f"the vocabulary head was called {len(caught)} times in one forward pass, expected once")
    return caught[0]


@torch.no_grad()
def returns_logits(model: nn.Module, head: nn.Linear, batch: Batch) -> bool:
    """Whether the model returns what its head computes, value by value: no scale, no cap, nothing in between.

    Told by numbers put in the place of the head's, since a cap of 30 does not show in logits of 1.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.labels.shape, head.out_features)
    probe = (torch.randn(shape, generator=generator) * 100).to(head.weight)

    def replace(_hidden: Tensor) -> Tensor:
        # A cap may be taken in place.
        return probe.clone()

    with forward_replaced(head, replace):
        logits = getattr(model(**model_inputs(model, batch)), "logits", None)
    return isinstance(logits, Tensor) and logits.shape == shape and torch.equal(logits.double(), probe.double())


@dataclass
class ChunkedHead:
    """Losses of a batch from hidden states; hands the head's gradient on part by part.

    `receive` is None where the head's weight has no rule. `touched` are the sorted ids int64 [U_b] per example
    whose rows the weight's other use, the embedding, also changes; `touched_rows` has the head's own gradient
    of them afterwards. `bias_grad` [B, V] is there afterwards where `wants_bias`. All gradients are of the losses
    times `scale` [B], by default 1.
    """

    head: nn.Linear
    targets: Tensor
    offsets: list[int]
    impl: str
    receive: ReceivePart | None = None
    touched: list[Tensor] = field(default_factory=list)
    wants_bias: bool = False
    scale: Tensor | None = None
    touched_rows: list[TouchedRows] = field(default_factory=list)
    bias_grad: Tensor | None = None

    @classmethod
    def of(cls, head: nn.Linear, batch: Batch, offsets: Tensor, impl: str) -> ChunkedHead:
        shifted = batch.labels[:, 1:]
        return cls(head, shifted[shifted != IGNORE_INDEX], offsets.tolist(), impl)

    def losses(self, hidden: Tensor) -> Tensor:
        """Mean token losses, float64 [B], connected to `hidden` [n, H]; for the backward pass of their sum times
        `scale`."""
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return _HeadLosses.apply(hidden, self)

    @torch.no_grad()
    def values(self, hidden: Tensor) -> Tensor:
        """Mean token losses, float64 [B], the bits of `losses`, without any gradient."""
        token_losses = torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        for first, last in self._groups(hidden):
            span = slice(self.offsets[first], self.offsets[last])
            token_losses[span] = self._token_losses(hidden[span], self.targets[span])
        return self._means(token_losses)

    def run(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(losses float64 [B], gradient of their scaled sum with respect to `hidden` [n, H])."""
        token_losses = torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        grad = torch.zeros_like(hidden)
        for span, rows, losses, dlogits in self._gradients(hidden):
            token_losses[span] = losses
            grad[span] += product(dlogits, self.head.weight[rows].t())
        return self._means(token_losses), grad

    @torch.no_grad()
    def again(self, hidden: Tensor, scale: Tensor, receive: ReceivePart) -> list[TouchedRows]:
        """The parts once more, of the losses times `scale` [B], to `receive`; the touched rows of them."""
        repeated = replace(self, scale=scale, receive=receive, wants_bias=False)
        for _ in repeated._gradients(hidden):
            pass
        return repeated.touched_rows

    def _gradients(self, hidden: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """(rows of `hidden`, rows of the weight, token losses [n], logits' gradient [n, rows]) part by part, each
        handed on when it comes."""
        counts = self._counts(hidden)
        weights = 1.0 / counts.double() if self.scale is None else self.scale.double() / counts
        weights = weights.repeat_interleave(counts).to(_wide(hidden.dtype))
        self.touched_rows = [TouchedRows(ids, hidden.new_zeros(len(ids), hidden.shape[1], dtype=weights.dtype))
                             for ids in self.touched]  # fmt: skip
        if self.wants_bias:
            self.bias_grad = hidden.new_zeros(len(counts), self.head.out_features, dtype=weights.dtype)
        for first, last in self._groups(hidden):
            span = slice(self.offsets[first], self.offsets[last])
            for rows, losses, dlogits in self._blocks(hidden[span], span, weights[span]):
                dlogits = dlogits.to(hidden.dtype)
                self._hand_on(first, last, hidden[span], dlogits, rows)
                yield span, rows, losses, dlogits

    def _counts(self, like: Tensor) -> Tensor:
        return torch.tensor(self.offsets).diff().to(like.device)

    def _means(self, token_losses: Tensor) -> Tensor:
        counts = self._counts(token_losses)
        sums = torch.zeros(len(counts), dtype=torch.float64, device=token_losses.device)
        return sums.index_add(0, torch.repeat_interleave(counts), token_losses) / counts

    def _groups(self, hidden: Tensor) -> Iterator[tuple[int, int]]:
        """Runs of examples whose logits fit, each of one example at least."""
        most = most_logits(hidden, self.head.weight) // self.head.out_features
        first = 0
        for last in range(1, len(self.offsets)):
            if last == len(self.offsets) - 1 or self.offsets[last + 1] - self.offsets[first] > most:
                if self.offsets[last] > self.offsets[first]:
                    yield first, last
                first = last

    def _blocks(self, hidden: Tensor, span: slice, weights: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows of the weight, token losses [n], logits' gradient [n, rows]) of one group.

        One example whose logits alone are too large goes by blocks of the vocabulary, twice: the first time for
        the normaliser, the second for the gradient.
        """
        targets, blocks = self.targets[span], self._vocabulary_blocks(hidden)
        if len(blocks) == 1:
            logits = self._logits(hidden, slice(None))
            yield slice(None), ops.cross_entropy_(logits, targets, weights, impl=self.impl), logits
            return
        if self._fused(hidden):
            losses, lse = gpu.linear_cross_entropy(hidden, self.head.weight, targets)
            width = blocks[0].stop
            for rows, gradient in gpu.logits_gradient(hidden, self.head.weight, targets, lse, weights, width):
                yield rows, losses.double(), gradient
            return
        most, total = self._normaliser(hidden, blocks)
        losses = self._losses_from(most, total, hidden, targets)
        for rows in blocks:
            gradient = self._logits(hidden, rows).sub_(most[:, None]).exp_()
            gradient *= (weights / total).to(gradient.dtype)[:, None]
            here = ((targets >= rows.start) & (targets < rows.stop)).nonzero().flatten()
            gradient[here, targets[here] - rows.start] -= weights[here]
            yield rows, losses, gradient

    def _token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Token losses float64 [n] of one group, as `_blocks` has them."""
        blocks = self._vocabulary_blocks(hidden)
        if len(blocks) == 1:
            unused = torch.zeros(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
            return ops.cross_entropy_(self._logits(hidden, slice(None)), targets, unused, impl=self.impl)
        if self._fused(hidden):
            return gpu.linear_cross_entropy(hidden, self.head.weight, targets)[0].double()
        return self._losses_from(*self._normaliser(hidden, blocks), hidden, targets)

    def _vocabulary_blocks(self, hidden: Tensor) -> list[slice]:
        """The whole vocabulary where the group's logits fit, else parts that do."""
        size = self.head.out_features
        width = max(1, most_logits(hidden, self.head.weight) // hidden.shape[0])
        # Whole tiles, in rows of whole 16-byte words: what kernels of a GPU are fast for.
        width -= width % BLOCK_WORDS if BLOCK_WORDS < width < size else 0
        return [slice(low, min(low + width, size)) for low in range(0, size, width)]

    def _losses_from(self, most: Tensor, total: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        of_target = (hidden * self.head.weight[targets]).sum(-1)
        if self.head.bias is not None:
            of_target += self.head.bias[targets]
        return total.log() - (of_target - most).double()

    def _fused(self, hidden: Tensor) -> bool:
        """Whether the GPU's kernels, which never write the logits, take this head."""
        asked = self.impl in ("triton", "cuda") or (self.impl == "auto" and hidden.is_cuda)
        return asked and self.head.bias is None and gpu.unsupported(hidden, self.head.weight) is None

    def _normaliser(self, hidden: Tensor, blocks: list[slice]) -> tuple[Tensor, Tensor]:
        """The largest logit of each row [n], and Σ exp(logit − largest), float64 [n]."""
        most = torch.full((hidden.shape[0],), -torch.inf, dtype=_wide(hidden.dtype), device=hidden.device)
        total = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        for rows in blocks:
            logits = self._logits(hidden, rows)
            higher = torch.maximum(most, logits.amax(-1))
            total *= (most - higher).double().exp()
            total += logits.sub_(higher[:, None]).exp_().sum(-1, dtype=torch.float64)
            most = higher
        return most, total

    def _logits(self, hidden: Tensor, rows: slice) -> Tensor:
        bias = self.head.bias[rows] if self.head.bias is not None else None
        logits = product(hidden, self.head.weight[rows], bias)
        return logits.to(_wide(logits.dtype))

    def _hand_on(self, first: int, last: int, hidden: Tensor, dlogits: Tensor, rows: slice) -> None:
        start = self.offsets[first]
        offsets = torch.tensor(self.offsets[first : last + 1]) - start
        if self.receive is not None:
            self.receive(first, LinearUse(hidden, dlogits, offsets), rows)
        spans = [slice(low, high) for low, high in pairwise(offsets.tolist())]
        for example, span in enumerate(spans, start=first):
            if self.touched_rows:
                self.touched_rows[example].add(hidden[span], dlogits[span], rows)
            if self.bias_grad is not None:
                self.bias_grad[example, rows] = dlogits[span].to(self.bias_grad.dtype).sum(0)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: ChunkedHead) -> Tensor:
        losses, grad = head.run(hidden)
        ctx.save_for_backward(grad, torch.ones_like(losses) if head.scale is None else head.scale.to(losses))
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        grad, scale = ctx.saved_tensors
        if not torch.equal(upstream[0], scale):
            raise ModelError("the losses of a chunked head were not scaled as was said before their backward pass")
        return grad, None


@dataclass(frozen=True)
class ChunkedLoss:
    """`montessori.losses.response_loss` of a model whose `head` goes by chunks, with fewer roundings.

    `impl` as in `montessori.ops`.
    """

    head: nn.Linear
    impl: str = "auto"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.weighted(model, batch, torch.ones(batch.size, dtype=torch.float64, device=batch.labels.device))

    def weighted(self, model: nn.Module, batch: Batch, weight: Tensor) -> Tensor:
        """Losses float64 [B]; for the backward pass of (losses · weight).sum().

        With gradients enabled, those of the head's own parameters are added to their `.grad` at once.
        """
        hidden = hidden_states(model, self.head, batch)
        chunks = ChunkedHead.of(self.head, batch, RowMap.of(batch).label_offsets, self.impl)
        matrix, bias = self.head.weight, self.head.bias
        trained = hidden.requires_grad or any(parameter.requires_grad for parameter in self.head.parameters())
        if not (torch.is_grad_enabled() and trained):
            return chunks.values(hidden)
        chunks.scale = weight
        chunks.wants_bias = bias is not None and bias.requires_grad
        if matrix.requires_grad:
            matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
            chunks.receive = partial(_add_part, matrix.grad)
        losses = chunks.losses(hidden)
        if chunks.bias_grad is not None:
            grad = chunks.bias_grad.sum(0).to(bias.dtype)
            bias.grad = grad if bias.grad is None else bias.grad.add_(grad)
        return losses


def _add_part(total: Tensor, _first: int, use: LinearUse, rows: slice) -> None:
    with torch.no_grad():
        add_product_(total[rows], use.dy, use.x)


def most_logits(hidden: Tensor, weight: Tensor) -> int:
    """Number of logits alive at a time: as many bytes as the head's weight has. The state of the weight is read for
    every group of examples, which must not be small where it is large."""
    least = GPU_LOGITS_BYTES if hidden.is_cuda else LOGITS_BYTES
    return max(least, weight.numel() * weight.element_size()) // _wide(hidden.dtype).itemsize


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
