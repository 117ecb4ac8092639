"""Proof before use: captured gradients against autograd's own, on two real examples of this model.

Of the ordinary loss windows of two references do; a loss function of the user's own is given whole candidates, since it
may need what a window lacks. Products are of unrounded factors meanwhile, whatever torch's switches say: rounding looks
like a mistake.

A weight that is also used behind its module's back, a module that mixes the examples of a batch or a
layer whose rows cannot be told apart would score wrong without a word. Such parameters are found here
and captured in another way (`Plan.leave`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from montessori.batching import IGNORE_INDEX, Example, collate
from montessori.capture import Capture
from montessori.errors import FallbackWarning, ModelError, MontessoriError, UntrainedLossError
from montessori.head import ChunkedLoss, HeadError, chunkable_head, returns_logits
from montessori.live import undisturbed
from montessori.losses import LossFunction, prove_packing, response_loss
from montessori.oracle import example_gradients, is_finite, norm
from montessori.parameters import trainable_parameters
from montessori.passes import evaluation_mode
from montessori.products import unrounded_products
from montessori.quantised_layers import compute_dtypes
from montessori.referenceset import PROOF_TOKENS
from montessori.rowmap import UnmappableRowsError
from montessori.rules import LOCAL, ModuleRule, Plan, make_plan
from montessori.uses import LinearUse, RestUse, RowsUse, Use, example_gradient
from montessori.wording import clipped

# Rounding allowed between two ways to sum the same products, relative to the gradient's norm.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# A gradient that is zero in exact arithmetic is rounding noise; measure it against the global norm.
NOISE_SHARE = 1e-3
# What is further off than so many tolerances is wrong, what is off at all only where two examples say so: rounding
# in bfloat16 now and then leaves a tolerance on one. An autograd that is as far from itself does not repeat.
SURELY, UNREPEATED = 2, 4
# Tokens of windows of which losses alone are compared.
LOSS_TOKENS = 32
# The chunked head rounds less than torch's float32 softmax over a large vocabulary does, whose error reaches 1e-3 of
# a norm's gradient; the rest of the model is proved without it.
HEAD_SLACK = 10


@dataclass
class _CompareSink:
    expected: dict[str, Tensor | None]
    position: int
    scale: float
    parameters: dict[str, nn.Parameter]
    tolerance: float
    slack: float = 1.0
    parts: dict[str, Tensor] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    unrepeated: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def use(self, name: str, use: Use | RestUse) -> None:
        self.used.add(name)
        if isinstance(use, RestUse):
            got = self._whole(name, use)
        else:
            got = example_gradient(use, self.position, self.parameters[name].shape)
        self._compare(name, got)

    def part(self, name: str, first: int, use: LinearUse, rows: slice) -> None:
        parameter, position = self.parameters[name], self.position - first
        if 0 <= position < use.offsets.numel() - 1:
            grad = example_gradient(use, position, parameter[rows].shape)
            self.parts.setdefault(name, torch.zeros_like(parameter, dtype=grad.dtype))[rows] = grad

    def _whole(self, name: str, use: RestUse) -> Tensor:
        """The parts, with the rest added where the parts' own rows say that it belongs."""
        grad = self.parts.pop(name, torch.zeros_like(self.parameters[name]))
        if use.rows is not None:
            ids, rows = use.parts[self.position].ids, use.parts[self.position].grad
            grad = grad.index_copy(0, ids, rows.to(grad.dtype))
            grad += example_gradient(RowsUse(use.rows), self.position, grad.shape)
        return grad

    def absent(self, name: str) -> None:
        self._compare(name, None)

    def _compare(self, name: str, got: Tensor | None) -> None:
        want = self.expected[name]
        if want is None or got is None:
            # However small: a use of the parameter that one of the two did not see.
            some = want if want is not None else got
            if some is not None and bool(some.any()):
                self.wrong.add(name)
                self.unrepeated.add(name)
            return
        error = float(norm(got - want))
        allowed = self.slack * self.tolerance * (float(norm(want)) + NOISE_SHARE * self.scale)
        for most, names in ((1, self.doubtful), (SURELY, self.wrong), (UNREPEATED, self.unrepeated)):
            if not error <= most * allowed:
                names.add(name)


def widest(tolerances: Mapping[torch.dtype, float], model: nn.Module) -> float:
    """That of the narrowest weights, or of what quantised ones multiply in: float32 adapters on a narrow model get
    gradients through its rounding."""
    dtypes = {parameter.dtype for parameter in model.parameters()} | compute_dtypes(model)
    return max(tolerances.get(dtype, 0.0) for dtype in dtypes)


@contextmanager
def failures_named() -> Iterator[None]:
    """Raises ModelError where the passes of a proof cannot be made or captured at all."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, MontessoriError | torch.OutOfMemoryError):
            raise
        check_one_dtype(error)
        raise ModelError(
            "a forward and backward pass in the weights' own dtypes cannot be made or captured "
            f"({type(error).__name__}: {clipped(error)}); a loss function calls the model for all rows of a batch at "
            "once, of different lengths, alone and together; method='exact' does not need that"
        ) from error


def check_one_dtype(error: Exception) -> None:
    """Raises ModelError where `error` is that of a product of two dtypes."""
    if isinstance(error, RuntimeError) and "dtype" in str(error):
        raise ModelError(
            f"a forward pass in the weights' own dtypes cannot be made ({type(error).__name__}: {clipped(error)}): "
            "cast the model to one dtype, as with model.to(torch.float32); under autocast it may have had several"
        ) from error


@contextmanager
def missing_inputs_named() -> Iterator[None]:
    """Raises ModelError where the model stops a forward pass, as for want of an argument that a row does not have."""
    try:
        yield
    except RuntimeError as error:
        check_one_dtype(error)
        raise
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, MontessoriError):
            raise
        raise ModelError(
            f"the loss of a reference row cannot be computed ({type(error).__name__}: {clipped(error)}); where the "
            "model's forward needs more than input_ids and attention_mask, pass loss_fn= and reference_loss_fn= that "
            "give it"
        ) from error


@unrounded_products()
def verified_plan(
    model: nn.Module, examples: Sequence[Example], loss: LossFunction, longer: Example | None = None
) -> Plan:
    """A plan whose captured gradients equal autograd's on windows of `examples` (one or two), and of one `longer`
    example that need not have a finite gradient; of a loss of the user's own, on the first two whole `examples` that
    have a gradient.

    Parameters that fail are captured by replayed calls; those that fail so too or are too large for it, and those that
    none of the examples reaches, are moved to the fallback, with one FallbackWarning that names them.
    """
    plan = make_plan(model)
    parameters = plan.trainable
    if loss is response_loss:
        examples = of_two_lengths([window(example, PROOF_TOKENS[i > 0]) for i, example in enumerate(examples)])
        examples = [*examples[:-1], *([] if longer is None else [window(longer, PROOF_TOKENS[0])]), examples[-1]]
    else:
        examples = with_gradient(model, parameters, examples, loss)
    proof = _Proof(model, plan, loss, several=len(examples) > 1)
    for position, example in enumerate(examples):
        expected, _ = example_gradients(model, parameters, example, loss)
        if not _are_finite(expected, example, loss, needed=longer is None or position != len(examples) - 2):
            continue
        proof.of(examples, position, expected)
        if position and loss is not response_loss:
            # Such a loss has the model see rows in an order of its own, and may do so for those in this order alone.
            proof.of(examples[::-1], len(examples) - 1 - position, expected)
    plan.fallback |= parameters.keys() - proof.proved
    plan.settle()
    if plan.fallback:
        _warn(plan)
    elif loss is response_loss:
        last = proof.sink(len(examples) - 1, expected, HEAD_SLACK)
        plan.head = _proved_head(model, plan.rules, examples)
        if plan.head is not None and (_disagreeing(model, plan, examples, loss, last)[0] or last.doubtful):
            plan.head = None
    return plan


@dataclass
class _Proof:
    """Goes on leaving what disagrees with autograd to other ways of capture, until nothing does. `several` examples are
    compared; `proved` has been seen to agree, `doubted` was off once."""

    model: nn.Module
    plan: Plan
    loss: LossFunction
    several: bool
    proved: set[str] = field(default_factory=set)
    doubted: set[str] = field(default_factory=set)

    def sink(self, position: int, expected: dict[str, Tensor | None], slack: float = 1.0) -> _CompareSink:
        scale = sum(float(norm(grad)) ** 2 for grad in expected.values() if grad is not None) ** 0.5
        return _CompareSink(expected, position, scale, self.plan.trainable, widest(TOLERANCE, self.model), slack)

    def of(self, group: Sequence[Example], position: int, expected: dict[str, Tensor | None]) -> None:
        """The gradient of the example at `position` of `group` against the `expected` one."""
        while True:
            sink, some = self.sink(position, expected), group
            if self.plan.per_example:
                some, sink.position = [group[position]], 0
            wrong, unmappable = _disagreeing(self.model, self.plan, some, self.loss, sink)
            # Where there is one example, nothing else can say so.
            wrong |= sink.doubtful & self.doubted if self.several else sink.doubtful
            if not wrong - self.plan.fallback:
                break
            self.plan.leave(wrong, unmappable)
        self.doubted |= sink.doubtful
        # Where the loss has no gradient at all, every rule would pass.
        self.proved |= sink.used if sink.scale else set()


def leave_all(plan: Plan) -> None:
    """Leave everything to autograd, with a FallbackWarning."""
    plan.fallback |= plan.trainable.keys()
    plan.head = None
    plan.settle()
    _warn(plan)


def with_gradient(
    model: nn.Module, parameters: dict[str, nn.Parameter], examples: Sequence[Example], loss: LossFunction
) -> Sequence[Example]:
    """The first two examples that give a finite gradient other than 0: a row of advantage 0, say, proves nothing.

    Raises UntrainedLossError where the loss of none depends on a parameter.
    """
    found: list[Example] = []
    faint: list[Example] = []
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    smallest = max(torch.finfo(dtype).tiny for dtype in dtypes) ** 0.5
    untrained: UntrainedLossError | None = None
    for example in examples:
        try:
            by_name, _ = example_gradients(model, parameters, example, loss)
        except UntrainedLossError as error:
            untrained = error
            continue
        grads = [grad for grad in by_name.values() if grad is not None]
        if any(bool(grad.any()) for grad in grads) and all(map(is_finite, grads)):
            # Of a pair that is long learned, say, nothing but the last bits of numbers near 0 are left.
            (found if max(map(norm, grads)) > smallest else faint).append(example)
        if len(found) == 2:
            return found
    found = [*found, *faint][:2]
    if not found and untrained is not None:
        raise untrained
    return found or examples[:1]


@missing_inputs_named()
@unrounded_products()
def prove_head(model: nn.Module, examples: Sequence[Example], loss: LossFunction) -> None:
    """`montessori.losses.prove_packing` on windows of two examples; a loss of one's own may use what it proves."""
    examples = [window(example, LOSS_TOKENS) for example in examples]
    # Twice the same: packed, its second turn stands elsewhere than alone, whatever the lengths.
    batch = collate([*examples[::-1], examples[-1]]).to(next(model.parameters()).device)
    with evaluation_mode(model), undisturbed(trainable_parameters(model)):
        try:
            prove_packing(model, batch)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            # Of a model that they cannot be taken of, such a loss does not.
            if loss is response_loss:
                raise


@unrounded_products()
def proved_loss(model: nn.Module, examples: Sequence[Example], loss: LossFunction, impl: str) -> LossFunction:
    """`loss`, or the same with the vocabulary head by chunks where that is proved on windows of `examples`."""
    if loss is not response_loss:
        return loss
    head = _proved_head(model, {}, [window(example, PROOF_TOKENS[1]) for example in examples])
    return loss if head is None else ChunkedLoss(head, impl)


def _proved_head(model: nn.Module, rules: dict[nn.Module, ModuleRule], examples: Sequence[Example]) -> nn.Linear | None:
    """The vocabulary head if its loss by chunks is the model's own."""
    head = chunkable_head(model, rules)
    if head is None:
        return None
    device = next(model.parameters()).device
    batch, short = collate(examples).to(device), collate([window(examples[0], LOSS_TOKENS)]).to(device)
    with torch.no_grad(), evaluation_mode(model):
        if not returns_logits(model, head, short):
            return None
        want = response_loss(model, batch)
        try:
            got = ChunkedLoss(head)(model, batch)
        except HeadError:
            return None
    allowed = TOLERANCE[head.weight.dtype] * want.abs()
    return head if bool(((got - want).abs() <= allowed).all()) else None


def window(example: Example, most: int) -> Example:
    """At most `most` neighbouring tokens of the example, around the first with a label."""
    first = int((example.labels[1:] != IGNORE_INDEX).nonzero()[0]) + 1
    start = max(0, min(first - most // 2, example.num_tokens - most))
    return Example(example.input_ids[start : start + most], example.labels[start : start + most], example.index)


def _are_finite(grads: Mapping[str, Tensor | None], example: Example, loss: LossFunction, needed: bool) -> bool:
    """Whether the gradients say something; those of a loss of the user's own need not, where no row has better ones.

    Raises ModelError where those of the ordinary loss are not finite and `needed`.
    """
    wrong = [name for name, grad in grads.items() if grad is not None and not is_finite(grad)]
    if wrong and needed and loss is response_loss:
        raise ModelError(
            f"{wrong[0]}: its gradient is not finite for a window of {example.num_tokens} tokens of a reference row; "
            "check the weights, and whether their dtype is wide enough"
        )
    return not wrong


def of_two_lengths(examples: Sequence[Example]) -> Sequence[Example]:
    """Examples of which two differ in length; alone, an example shows neither padding nor mixing."""
    first = examples[0]
    if any(example.num_tokens != first.num_tokens for example in examples):
        return examples
    if first.num_tokens <= 2:
        return [*examples, Example(first.input_ids.repeat(2), first.labels.repeat(2), first.index)]
    # Without the last token, or, where it has the only label, without the first.
    part = slice(0, -1) if bool((first.labels[1:-1] != IGNORE_INDEX).any()) else slice(1, None)
    return [*examples, Example(first.input_ids[part], first.labels[part], first.index)]


def _disagreeing(
    model: nn.Module, plan: Plan, group: Sequence[Example], loss: LossFunction, sink: _CompareSink
) -> tuple[set[str], bool]:
    """Parameters whose captured gradient is not the expected one, and whether for rows that cannot be told apart."""
    device = next(iter(plan.trainable.values())).device
    capture = Capture(model, plan, rows_checked=loss is not response_loss)
    try:
        with capture.installed():
            capture.run(collate(group).to(device), loss, sink)
        plan.held = capture.held // len(group)
    except UnmappableRowsError as error:
        names = _called_alike(plan, error.module) if error.module else plan.trainable.keys()
        if not names - plan.fallback:
            raise
        return set(names), True
    except UntrainedLossError:
        # No hook saw any of them used.
        names = plan.trainable.keys() - plan.fallback
        if not names:
            raise
        return set(names), True
    if sink.unrepeated and sink.wrong <= plan.fallback:
        raise ModelError(
            f"{sorted(sink.unrepeated)[0]}: autograd gives two different gradients for the same example: a loss "
            "function draws random numbers or puts the model in train mode, the model's forward pass is not "
            "deterministic in eval mode or quantises what its layers are given, or, in float64, computes in float32: "
            "load it in float32"
        )
    return sink.wrong | capture.grown, False


def _called_alike(plan: Plan, module_name: str) -> set[str]:
    """Parameters of the module, and of all modules of its class where its rule is `local`.

    A model calls its norms of one class in one way: they need not fail one after the other.
    """
    rules = [(type(module), rule) for module, rule in plan.rules.items()]
    alike = {kind for kind, rule in rules if rule.module_name == module_name and rule.kind == LOCAL}
    found = [rule for kind, rule in rules if rule.module_name == module_name or (rule.kind == LOCAL and kind in alike)]
    names = {name for rule in found for name in rule.parameters.values()}
    return names | {name for name in plan.replayed if name.rpartition(".")[0] == module_name}


def _warn(plan: Plan) -> None:
    names = sorted(plan.fallback)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    warnings.warn(
        f"{shown}: no capture rule holds for {len(names)} parameter(s); they are scored by per-example "
        "autograd, which is exact but takes one example at a time",
        FallbackWarning,
        stacklevel=3,
    )
