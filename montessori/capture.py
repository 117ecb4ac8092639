"""Per-example gradients in factored form, caught by hooks while the model runs forward and backward.

The model runs unchanged. A hook on a module's forward keeps its input X; a hook on its output receives
dY in the backward pass and hands (X, dY) on at once. The parameters that a rule covers do not require
grad meanwhile, so autograd skips their weight-gradient products: they are replaced, not doubled. Plain
linear layers compute the same products through the faster library (`montessori.products`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from montessori import ops
from montessori.batching import Batch
from montessori.calls import EmbeddingCalls, ProductCalls
from montessori.errors import ModelError, UntrainedLossError
from montessori.experts import ExpertStack, chosen_by_expert, expert_matrix, experts_forward
from montessori.head import ChunkedHead, hidden_states
from montessori.local import local_gradients
from montessori.losses import LossFunction
from montessori.ops import SparseRows
from montessori.passes import evaluation_mode, example_losses, gradients_aside
from montessori.products import fast_products, forward_replaced, linear
from montessori.replay import ReplayedCalls
from montessori.rowmap import RowMap, Rows, UnmappableRowsError
from montessori.rules import CONV1D, EMBEDDING, EXPERTS, LOCAL, PRODUCT, ModuleRule, Plan
from montessori.strangers import leaves_below
from montessori.uses import DenseUse, LinearUse, RestUse, RowsUse, Use, merge


class Sink(Protocol):
    """Receives every trainable parameter once per batch, with its gradient or as absent (gradient 0)."""

    def use(self, name: str, use: Use | RestUse) -> None: ...

    def part(self, name: str, first: int, use: LinearUse, rows: slice) -> None:
        """The gradient of `rows` of a matrix for the examples from `first` on; a RestUse ends the parts."""

    def absent(self, name: str) -> None: ...


class Capture:
    """Runs batches through `model` and hands each parameter's per-example gradient to a sink.

    `impl` is that of the chunked head's cross-entropy, see `montessori.ops`. `grown` and `held` are those of the last
    run's replayed calls, see `montessori.replay`. With `rows_checked` the model has to be given the rows of a batch all
    together and in order, which a loss function of the user's own may do for some batches and not for others.
    """

    def __init__(self, model: nn.Module, plan: Plan, impl: str = "auto", rows_checked: bool = False) -> None:
        self._model = model
        self._plan = plan
        self._impl = impl
        self._rows_checked = rows_checked
        self._batch: Batch | None = None
        self._parts: dict[str, RestUse] = {}
        self.grown: set[str] = set()
        self.held = 0
        self._rows: RowMap | None = None
        self._sink: Sink | None = None
        self._expected: Counter[str] = Counter()
        self._received: defaultdict[str, list[Use]] = defaultdict(list)
        self._remaining: set[str] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in place, covered parameters frozen, dropout off, gradients of the user put aside."""
        covered = [p for name, p in self._plan.trainable.items() if name not in self._plan.fallback]
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(gradients_aside(self._plan.trainable.values()))
            for parameter in covered:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            stack.enter_context(fast_products(self._model))
            for module, rule in self._plan.rules.items():
                if module is not self._plan.head:
                    self._watch(module, rule, stack)
            table = getattr(self._model, "get_input_embeddings", lambda: None)()
            if self._rows_checked and isinstance(table, nn.Module):
                stack.callback(table.register_forward_pre_hook(self._text_given).remove)
            yield

    def run(self, batch: Batch, loss: LossFunction, sink: Sink) -> Tensor:
        """Losses of the batch, float64 [B]; the sink has every parameter when this returns."""
        if self._plan.per_example and batch.size > 1:
            raise ModelError(f"this model is captured one example at a time, got a batch of {batch.size}")
        self._rows, self._sink, self._batch = RowMap.of(batch, self._labelled()), sink, batch
        self._expected.clear()
        self._received.clear()
        self._remaining = set(self._plan.trainable)
        try:
            with self._replayed_calls() as calls:
                losses = example_losses(self._model, batch, loss if self._plan.head is None else self._chunked_losses)
            self.grown, self.held = (calls.grown, calls.held) if calls is not None else (set(), 0)
            losses.sum().backward()
            self._flush()
            self._active_rows.settle()
        finally:
            self._received.clear()
            self._parts.clear()
            self._rows = self._sink = self._batch = None
            for parameter in self._plan.trainable.values():
                parameter.grad = None
        return losses.detach()

    def reached(self, batch: Batch, loss: LossFunction, names: Iterable[str]) -> set[str]:
        """Which of the parameters `names`, frozen while the hooks are in place, the losses depend on, by another pass
        over the same batch: in another one a model may use them otherwise."""
        asked, head = {id(self._plan.trainable[name]): name for name in names}, self._plan.head
        try:
            for name in asked.values():
                self._plan.trainable[name].requires_grad_(True)
            # The logits of a whole batch are more than it may hold.
            output = (
                example_losses(self._model, batch, loss) if head is None else hidden_states(self._model, head, batch)
            )
            leaves = leaves_below(output)
        except UntrainedLossError:
            leaves = []
        finally:
            for name in asked.values():
                self._plan.trainable[name].requires_grad_(False)
        return {asked[id(leaf)] for leaf in leaves if id(leaf) in asked}

    def _labelled(self) -> str | None:
        """The module that labelled rows alone may reach, where a loss of the user's own may have other texts."""
        if not self._rows_checked:
            return None
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        return next((name for name, module in self._model.named_modules() if module is head), "no head")

    def _flush(self) -> None:
        for name in sorted(self._plan.fallback):
            grad = self._plan.trainable[name].grad
            if grad is not None:
                self._deliver(name, DenseUse(grad.unsqueeze(0)))
        for name in list(self._received):
            self._deliver_all(name)
        for name in list(self._parts):
            self._deliver_rest(name, None)
        for name in sorted(self._remaining):
            self._active_sink.absent(name)

    @property
    def _active_sink(self) -> Sink:
        if self._sink is None:
            raise ModelError("a capture hook fired outside Capture.run: the model was called by someone else")
        return self._sink

    def _deliver(self, name: str, use: Use) -> None:
        """Pass a parameter on as soon as all its uses of the forward pass have their gradient."""
        self._received[name].append(use)
        if len(self._received[name]) >= self._expected[name]:
            self._deliver_all(name)

    def _deliver_all(self, name: str) -> None:
        merged = merge(self._received.pop(name))
        if merged is None:
            raise ModelError(f"{name}: used both as a matrix and element by element, which cannot be captured")
        if name in self._parts:
            self._deliver_rest(name, merged)
            return
        self._remaining.discard(name)
        self._active_sink.use(name, merged)

    def _deliver_rest(self, name: str, use: Use | None) -> None:
        if use is not None and not isinstance(use, RowsUse):
            raise ModelError(f"{name}: the vocabulary head's weight is also used as a matrix elsewhere")
        self._remaining.discard(name)
        self._active_sink.use(name, replace(self._parts.pop(name), rows=use.rows if use is not None else None))

    def _chunked_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """`response_loss` with the head by chunks, whose gradients go to the sink at once."""
        head = self._plan.head
        if head is None:
            raise ModelError("the plan has no head that goes by chunks")
        hidden = hidden_states(model, head, batch)
        chunks = ChunkedHead.of(head, batch, self._active_rows.label_offsets, self._impl)
        names = self._plan.rules[head].parameters if head in self._plan.rules else {}
        if "weight" in names:
            name = names["weight"]
            chunks.receive = partial(self._active_sink.part, name)
            if any(rule.kind == EMBEDDING and name in rule.parameters.values() for rule in self._plan.rules.values()):
                chunks.touched = _touched(batch)
        chunks.wants_bias = "bias" in names
        losses = chunks.losses(hidden)
        if "weight" in names:
            again = partial(chunks.again, hidden.detach())
            self._parts[names["weight"]] = RestUse(None, chunks.touched_rows, again)
        if chunks.bias_grad is not None:
            self._expected[names["bias"]] += 1
            self._deliver(names["bias"], DenseUse(chunks.bias_grad))
        return losses

    def _watch(self, module: nn.Module, rule: ModuleRule, stack: ExitStack) -> None:
        """Catch what `rule` captures of the module until `stack` closes."""
        if rule.kind == EXPERTS:
            stack.enter_context(forward_replaced(module, partial(self._experts_called, rule, module)))
        elif rule.kind in (EMBEDDING, PRODUCT):
            calls = self._calls(module, rule)
            stack.callback(module.register_forward_pre_hook(lambda *_: calls.start()).remove)
            stack.callback(module.register_forward_hook(lambda *_: calls.stop(), always_call=True).remove)
            # Hooks are not called after an interrupt.
            stack.callback(calls.stop)
        else:
            called = self._local_called if rule.kind == LOCAL else self._linear_called
            stack.callback(module.register_forward_hook(partial(called, rule), with_kwargs=True).remove)

    def _calls(self, module: nn.Module, rule: ModuleRule) -> EmbeddingCalls | ProductCalls:
        if rule.kind == EMBEDDING:
            return EmbeddingCalls(module, partial(self._embedding_called, rule))
        return ProductCalls(module, partial(self._product_called, rule))

    def _replayed_calls(self) -> AbstractContextManager[ReplayedCalls | None]:
        if not self._plan.replayed:
            return nullcontext()
        parameters = {name: self._plan.trainable[name] for name in sorted(self._plan.replayed)}
        return ReplayedCalls(parameters, self._active_rows, self._track, self._deliver)

    def _linear_called(
        self,
        rule: ModuleRule,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        names = rule.parameters.values()
        return self._track(names, output, partial(self._linear_gradient, rule, x.detach(), x._version))

    def _product_called(
        self, rule: ModuleRule, attributes: tuple[str, ...], x: Tensor | None, output: Tensor
    ) -> Tensor:
        used = {key: name for key, name in rule.parameters.items() if key in attributes}
        if not used:
            return output
        rule = ModuleRule(rule.kind, rule.module_name, used)
        if x is None:
            return self._track(used.values(), output, partial(self._bias_gradient, rule))
        return self._track(used.values(), output, partial(self._linear_gradient, rule, x.detach(), x._version))

    def _bias_gradient(self, rule: ModuleRule, dy: Tensor) -> None:
        rows = self._active_rows.gradient_rows(dy, rule.module_name)
        self._deliver(rule.parameters["bias"], DenseUse(self._sums(rows)))

    def _sums(self, rows: Rows) -> Tensor:
        return ops.example_sums(rows.values, rows.offsets, starts=rows.starts, impl=self._impl)

    def _linear_gradient(self, rule: ModuleRule, x: Tensor, version: int, dy: Tensor) -> None:
        if x._version != version:
            raise ModelError(f"{rule.module_name}: its input was changed in place after use, cannot be captured")
        rows = self._active_rows.gradient_rows(dy, rule.module_name)
        if "weight" in rule.parameters:
            factors = (self._active_rows.rows(x, rule.module_name).values, rows.values)
            factors = factors[::-1] if rule.kind == CONV1D else factors
            self._deliver(rule.parameters["weight"], LinearUse(*factors, rows.offsets, starts=rows.starts))
        if "bias" in rule.parameters:
            self._deliver(rule.parameters["bias"], DenseUse(self._sums(rows)))

    def _experts_called(
        self, rule: ModuleRule, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        chosen = chosen_by_expert(top_k_index, module.num_experts)
        stacks: dict[str, ExpertStack] = {}
        if torch.is_grad_enabled() and self._sink is not None:
            rows, tokens = self._active_rows, hidden_states.shape[0]
            if tokens != rows.size * rows.length:
                if not (rows.size == 1 or rows.is_text(tokens)):
                    raise UnmappableRowsError(rule.module_name, tuple(hidden_states.shape), rows.size)
                # Another text than the rows themselves.
                rows = rows.with_padding(tokens // rows.size)
            self._expected.update(rule.parameters.values())
            stacks = {
                name: ExpertStack(rule, name, module, rows, len(chosen), self._deliver, self._impl)
                for name in rule.stacks
            }

        def product(name: str, expert: int, tokens: Tensor, x: Tensor) -> Tensor:
            y = linear(x, *expert_matrix(module, name, expert))
            if name not in stacks:
                return y
            return self._on_gradient(y, partial(stacks[name].receive, expert, tokens, x.detach()))

        return experts_forward(module, product, chosen, hidden_states, top_k_weights)

    def _local_called(
        self, rule: ModuleRule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise UnmappableRowsError(rule.module_name, (), self._rows.size if self._rows else 0)
        names = rule.parameters.values()
        return self._track(names, output, partial(self._local_gradient, rule, module, args[0].detach()))

    def _local_gradient(self, rule: ModuleRule, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        """Run a small module again on each example's rows and differentiate it there.

        Exact for any module that treats rows alike, whatever its formula and inner precision.
        """
        x_rows = self._active_rows.rows(x, rule.module_name)
        dy_rows = self._active_rows.gradient_rows(dy, rule.module_name)
        with self._paused(), torch.enable_grad():
            grads = local_gradients(rule, module, x_rows.values, dy_rows, self._impl)
        for name, per_example in zip(rule.parameters.values(), grads, strict=True):
            self._deliver(name, DenseUse(per_example))

    def _text_given(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raises UnmappableRowsError where look-ups are not of the rows of the batch, or of them in another order."""
        batch, ids = self._batch, args[0] if args else None
        # Of one example, rows are its own however they come.
        if batch is None or batch.size == 1 or not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        text = batch.input_ids
        if ids.shape[0] != batch.size:
            reason = f"the loss function gives the model {ids.shape[0]} rows where a batch has {batch.size}"
            raise UnmappableRowsError("", tuple(ids.shape), batch.size, reason)
        if ids.shape == text.shape and torch.equal(ids, text):
            return
        # Without the last token, say, or with others before.
        width = min(ids.shape[1], text.shape[1])
        if _turned(ids[:, :width], text[:, :width]) or _turned(ids[:, -width:], text[:, -width:]):
            reason = "the loss function gives the model the rows of a batch in another order"
            raise UnmappableRowsError("", tuple(ids.shape), batch.size, reason)
        self._active_rows.others.add(ids.shape[1])
        if ids.shape == text.shape:
            # Other texts, such as rejected answers, with their padding elsewhere.
            self._rows = self._active_rows.with_padding(text.shape[1])

    def _embedding_called(self, rule: ModuleRule, ids: Tensor, padding_idx: int | None, output: Tensor) -> Tensor:
        lengths = {self._active_rows.length} | self._active_rows.others if self._sink is not None else set()
        if ids.dim() == 2 and ids.shape[0] == 1 and ids.shape[1] in lengths:
            # One look-up for the positions of all examples: each gets its own, so that gradients stay apart.
            ids = ids.expand(self._active_rows.size, -1)
            output = output.expand(*ids.shape, -1)
        names = rule.parameters.values()
        return self._track(names, output, partial(self._embedding_gradient, rule, ids, padding_idx))

    def _embedding_gradient(self, rule: ModuleRule, ids: Tensor, padding_idx: int | None, dy: Tensor) -> None:
        rows = self._active_rows
        dy_rows = rows.gradient_rows(dy, rule.module_name)
        packed_dy, packed_ids = (
            rows.pack(given) for given in (dy_rows, rows.rows(ids.unsqueeze(-1), rule.module_name))
        )
        packed_ids = packed_ids.squeeze(-1).long()
        if padding_idx is not None:
            # torch gives the padding row no gradient even where the token is part of the text.
            packed_dy = packed_dy.masked_fill((packed_ids == padding_idx).unsqueeze(-1), 0)
        self._deliver(rule.parameters["weight"], RowsUse(SparseRows(packed_ids, packed_dy, dy_rows.offsets)))

    @property
    def _active_rows(self) -> RowMap:
        if self._rows is None:
            raise ModelError("a capture hook fired outside Capture.run: the model was called by someone else")
        return self._rows

    def _track(self, names: Iterable[str], output: Tensor, on_gradient: Callable[[Tensor], None]) -> Tensor:
        """Call `on_gradient`, which delivers `names`, with the output's gradient; returns the output to go on with."""
        if self._sink is None:
            return output
        self._expected.update(names)
        return self._on_gradient(output, on_gradient)

    @staticmethod
    def _on_gradient(output: Tensor, on_gradient: Callable[[Tensor], None]) -> Tensor:
        source = output if output.requires_grad else output.detach().requires_grad_().clone()

        def receive(dy: Tensor) -> None:
            with torch.no_grad():
                on_gradient(dy)

        source.register_hook(receive)
        return source

    @contextmanager
    def _paused(self) -> Iterator[None]:
        sink, self._sink = self._sink, None
        try:
            yield
        finally:
            self._sink = sink


def _turned(ids: Tensor, text: Tensor) -> bool:
    """Whether all rows of ids [B, W] are rows of `text`, some of them others than their own."""
    there = (ids[:, None] == text).all(-1)
    return bool(there.any(1).all()) and not bool(there.diagonal().all())


def _touched(batch: Batch) -> list[Tensor]:
    """Sorted ids of each example's tokens."""
    example, token = batch.attention_mask.bool().nonzero(as_tuple=True)
    ids = batch.input_ids[example, token]
    table = int(ids.max()) + 1
    keys = (example * table + ids).unique()
    counts = torch.bincount(keys // table, minlength=batch.size)
    return list((keys % table).split(counts.tolist()))
