"""Proof before use: captured gradients against autograd's own, on two real examples of this model.

A weight that is also used behind its module's back, a module that mixes the examples of a batch or a
layer whose rows cannot be told apart would score wrong without a word. Such parameters are found here
and left to per-example autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from montessori.batching import Example, collate
from montessori.capture import Capture
from montessori.errors import FallbackWarning, ModelError
from montessori.losses import LossFunction
from montessori.oracle import example_gradients
from montessori.rowmap import UnmappableRowsError
from montessori.rules import Plan, make_plan
from montessori.uses import Use, example_gradient

# Rounding allowed between two ways to sum the same products, relative to the gradient's norm.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# A gradient that is zero in exact arithmetic is rounding noise; measure it against the global norm.
NOISE_SHARE = 1e-3


@dataclass
class _CompareSink:
    expected: dict[str, Tensor | None]
    position: int
    scale: float
    parameters: dict[str, nn.Parameter]
    wrong: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def use(self, name: str, use: Use) -> None:
        self.used.add(name)
        got = example_gradient(use, self.position, self.parameters[name].shape)
        self._compare(name, got)

    def absent(self, name: str) -> None:
        self._compare(name, None)

    def _compare(self, name: str, got: Tensor | None) -> None:
        want = self.expected[name]
        if want is None and got is None:
            return
        some = want if want is not None else got
        if some is None:
            return
        want = torch.zeros_like(some) if want is None else want
        got = torch.zeros_like(some) if got is None else got
        error = float((got.double() - want.double()).norm())
        allowed = TOLERANCE[want.dtype] * (float(want.double().norm()) + NOISE_SHARE * self.scale)
        if not error <= allowed:
            self.wrong.add(name)


def verified_plan(model: nn.Module, examples: Sequence[Example], loss: LossFunction) -> Plan:
    """A plan whose captured gradients equal autograd's on `examples` (one or two short ones).

    Parameters that fail, and those that none of the examples reaches, are moved to the fallback, with one
    FallbackWarning that names them.
    """
    plan = make_plan(model)
    parameters = plan.trainable
    examples = _of_two_lengths(examples)
    proved: set[str] = set()
    for position, example in enumerate(examples):
        expected, _ = example_gradients(model, parameters, example, loss)
        norms = [float(grad.double().norm()) for grad in expected.values() if grad is not None]
        scale = sum(norm**2 for norm in norms) ** 0.5
        while True:
            sink = _CompareSink(expected, position, scale, parameters)
            group = examples
            if plan.per_example:
                group, sink.position = [example], 0
            wrong = _disagreeing(model, plan, group, loss, sink)
            if not wrong - plan.fallback:
                break
            plan.fallback |= wrong
        proved |= sink.used
    plan.fallback |= parameters.keys() - proved
    if plan.fallback:
        _warn(plan)
    return plan


def _of_two_lengths(examples: Sequence[Example]) -> Sequence[Example]:
    """Examples of which two differ in length; alone, an example shows neither padding nor mixing."""
    first = examples[0]
    if any(example.num_tokens != first.num_tokens for example in examples):
        return examples
    ids = first.input_ids[:-1] if first.num_tokens > 2 else first.input_ids.repeat(2)
    return [*examples, Example(ids, ids.clone(), first.index)]


def _disagreeing(
    model: nn.Module, plan: Plan, group: Sequence[Example], loss: LossFunction, sink: _CompareSink
) -> set[str]:
    device = next(iter(plan.trainable.values())).device
    capture = Capture(model, plan)
    try:
        with capture.installed():
            capture.run(collate(group).to(device), loss, sink)
    except UnmappableRowsError as error:
        names = {
            name
            for rule in plan.rules.values()
            if rule.module_name == error.module
            for name in rule.parameters.values()
        }
        if not names - plan.fallback:
            raise
        return names
    if sink.wrong and sink.wrong <= plan.fallback:
        raise ModelError(
            f"{sorted(sink.wrong)[0]}: autograd gives two different gradients for the same example; "
            "the model's forward pass is not deterministic in eval mode"
        )
    return sink.wrong


def _warn(plan: Plan) -> None:
    names = sorted(plan.fallback)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    warnings.warn(
        f"{shown}: no capture rule holds for {len(names)} parameter(s); they are scored by per-example "
        "autograd, which is exact but takes one example at a time",
        FallbackWarning,
        stacklevel=3,
    )
