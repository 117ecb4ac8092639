"""Which rule captures the per-example gradient of which parameter.

A rule covers a parameter only when it is known to hold for every module that owns it; the rest falls
back to plain autograd, one example at a time. Nothing is left out in silence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from montessori.experts import are_experts

LINEAR, CONV1D, EMBEDDING, LOCAL = "linear", "conv1d", "embedding", "local"
PRODUCT, EXPERTS, EXPANDED = "product", "experts", "expanded"


@dataclass(frozen=True)
class ModuleRule:
    """How the trainable parameters of one module are captured; names as in `named_parameters()`."""

    kind: str
    module_name: str
    parameters: dict[str, str]  # attribute of the module -> parameter name


@dataclass
class Plan:
    """Rules per module, and the parameters left to per-example autograd."""

    rules: dict[nn.Module, ModuleRule]
    trainable: dict[str, nn.Parameter]
    fallback: set[str] = field(default_factory=set)
    # The vocabulary head, where it goes by chunks with its loss instead of through a hook.
    head: nn.Linear | None = None

    @property
    def per_example(self) -> bool:
        """Whether batches must hold one example because a parameter needs the fallback."""
        return bool(self.fallback)

    def coverage(self) -> dict[str, int]:
        """Number of trainable scalars per rule, plus `autograd` for the fallback; sums to all of them."""
        kinds = {name: rule.kind for rule in self.rules.values() for name in rule.parameters.values()} | dict.fromkeys(
            self.fallback, "autograd"
        )
        counted: Counter[str] = Counter()
        for name, parameter in self.trainable.items():
            counted[kinds[name]] += parameter.numel()
        return dict(counted)


def make_plan(model: nn.Module) -> Plan:
    """Assign a rule to every module that owns a trainable parameter."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {parameter: name for name, parameter in trainable.items()}
    plan = Plan(rules={}, trainable=trainable)
    for module_name, module in model.named_modules():
        owned = {
            attribute: names[parameter]
            for attribute, parameter in module.named_parameters(recurse=False)
            if parameter in names
        }
        if not owned:
            continue
        kind = _kind(module)
        if kind is None:
            plan.fallback.update(owned.values())
        else:
            plan.rules[module] = ModuleRule(kind, module_name, owned)
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
    if set(sizes.values()) == {1}:
        return LOCAL if next(module.children(), None) is None else EXPANDED
    return PRODUCT if sizes in ({"weight": 2}, {"weight": 2, "bias": 1}) else None
