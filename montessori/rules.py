"""Which rule captures the per-example gradient of which parameter.

A rule covers a parameter only when it is known to hold for every module that owns it; of the rest, small parameters
have their calls replayed, and others go to plain autograd, one example at a time. Nothing is left out in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from montessori.experts import ExpertAdapter, are_experts, expert_adapters
from montessori.parameters import trainable_parameters
from montessori.replay import MOST_HELD, MOST_VALUES

LINEAR, CONV1D, EMBEDDING, LOCAL = "linear", "conv1d", "embedding", "local"
PRODUCT, EXPERTS, REPLAYED = "product", "experts", "replayed"


@dataclass(frozen=True)
class ModuleRule:
    """How the trainable parameters of one module, and of adapters on its experts, are captured; names as in
    `named_parameters()`."""

    kind: str
    module_name: str
    parameters: dict[str, str]  # attribute of the module, or key of an adapter's part -> parameter name
    adapters: tuple[ExpertAdapter, ...] = ()

    @property
    def stacks(self) -> set[str]:
        """Attributes of stacked matrices whose gradient something here takes."""
        adapted = {adapter.of for adapter in self.adapters if not self.parameters.keys().isdisjoint(adapter.keys)}
        keys = {key for adapter in self.adapters for key in adapter.keys}
        return adapted | {key.removesuffix("_bias") for key in self.parameters.keys() - keys}


@dataclass
class Plan:
    """Rules per module; the parameters whose calls are replayed, and those left to per-example autograd."""

    rules: dict[nn.Module, ModuleRule]
    trainable: dict[str, nn.Parameter]
    replayed: set[str] = field(default_factory=set)
    fallback: set[str] = field(default_factory=set)
    # The vocabulary head, where it goes by chunks with its loss instead of through a hook.
    head: nn.Linear | None = None
    # Bytes that replayed calls hold of each example during a pass.
    held: int = 0

    @property
    def per_example(self) -> bool:
        """Whether batches must hold one example because a parameter needs the fallback."""
        return bool(self.fallback)

    @property
    def most_examples(self) -> int:
        """Of one pass: as many as MOST_HELD allows what replayed calls hold."""
        return max(1, MOST_HELD // max(1, self.held))

    def leave(self, names: Iterable[str], unmappable: bool) -> None:
        """Capture `names` in another way: by replayed calls where they are small, else by the fallback.

        Calls of experts are on tokens in an order of their own, which a replay would not tell apart. A local module
        that does run on its rows and still disagrees is one that rounds more than the model's dtype; replayed calls
        would only round in another way.
        """
        local = {name for rule in self.rules.values() if rule.kind == LOCAL for name in rule.parameters.values()}
        experts = {name for rule in self.rules.values() if rule.kind == EXPERTS for name in rule.parameters.values()}
        for name in names:
            tried = name in self.replayed or name in experts or (name in local and not unmappable)
            if tried or self.trainable[name].numel() > MOST_VALUES:
                self.fallback.add(name)
            else:
                self.replayed.add(name)
        self.settle()

    def settle(self) -> None:
        """Take from the rules what is replayed or left to the fallback, and from the former the latter."""
        self.replayed -= self.fallback
        elsewhere = self.replayed | self.fallback
        kept = {
            module: {key: name for key, name in rule.parameters.items() if name not in elsewhere}
            for module, rule in self.rules.items()
        }
        self.rules = {module: replace(self.rules[module], parameters=own) for module, own in kept.items() if own}

    def coverage(self) -> dict[str, int]:
        """Number of trainable scalars per rule, plus `autograd` for the fallback; sums to all of them."""
        kinds = {name: rule.kind for rule in self.rules.values() for name in rule.parameters.values()}
        kinds |= dict.fromkeys(self.replayed, REPLAYED) | dict.fromkeys(self.fallback, "autograd")
        counted: Counter[str] = Counter()
        for name, parameter in self.trainable.items():
            counted[kinds[name]] += parameter.numel()
        return dict(counted)


def make_plan(model: nn.Module) -> Plan:
    """Assign a rule to every module that owns a trainable parameter."""
    trainable = trainable_parameters(model)
    names = {parameter: name for name, parameter in trainable.items()}
    plan = Plan(rules={}, trainable=trainable)
    adapted = expert_adapters(model)
    adapting = {part for adapters in adapted.values() for adapter in adapters for part in (adapter.a, adapter.b)}
    for module_name, module in model.named_modules():
        adapters = adapted.get(module, ())
        parameters = dict(module.named_parameters(recurse=False)) | {
            key: part.weight
            for adapter in adapters
            for key, part in zip(adapter.keys, (adapter.a, adapter.b), strict=True)
        }
        owned = {key: names[parameter] for key, parameter in parameters.items() if parameter in names}
        kind = _kind(module) if owned and module not in adapting else None
        if kind is not None:
            plan.rules[module] = ModuleRule(kind, module_name, owned, adapters)
    # What only modules of no known kind own.
    ruled = {name for rule in plan.rules.values() for name in rule.parameters.values()}
    plan.leave(trainable.keys() - ruled, unmappable=True)
    return plan


def _kind(module: nn.Module) -> str | None:
    attributes = {attribute for attribute, _ in module.named_parameters(recurse=False)}
    if type(module).forward is nn.Linear.forward:
        return LINEAR if attributes <= {"weight", "bias"} else None
    if isinstance(module, Conv1D):
        return CONV1D if attributes <= {"weight", "bias"} else None
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return EMBEDDING if plain and attributes == {"weight"} else None
    if are_experts(module):
        return EXPERTS
    sizes = {attribute: parameter.dim() for attribute, parameter in module.named_parameters(recurse=False)}
    if set(sizes.values()) == {1} and next(module.children(), None) is None:
        return LOCAL
    return PRODUCT if sizes in ({"weight": 2}, {"weight": 2, "bias": 1}) else None
