"""Mixtures of experts as transformers 5 lays them out: all experts of a layer in one tensor [E, O, I].

Dimensions: N tokens of a batch, H hidden features, k experts of a token, E experts, n tokens of one expert.

PEFT's `target_parameters` adds to such a tensor a product of two matrices for each expert (`ExpertAdapter`).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from montessori import ops
from montessori.rowmap import RowMap
from montessori.uses import DenseUse, ExpertsUse, LinearUse, Stack, Use

if TYPE_CHECKING:
    from montessori.rules import ModuleRule

_UP = ("gate_up_proj", "up_proj")
_DOWN = "down_proj"

# (name, expert, rows, x): x [n, I] of the tokens `rows`, int64 [n], through the matrix `name` of one expert.
ExpertLinear = Callable[[str, int, Tensor, Tensor], Tensor]


def are_experts(module: nn.Module) -> bool:
    """Whether `module` follows the interface by which transformers exchanges implementations of experts.

    Such a module is described by its flags, `_apply_gate` or `act_fn`, and its stacked matrices alone.
    """
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts")
    if not all(hasattr(module, name) for name in flags) or getattr(module, "has_post_expert_norm", False):
        return False
    sizes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    up = _up(module)
    known = {up: 3, _DOWN: 3} | ({f"{up}_bias": 2, f"{_DOWN}_bias": 2} if module.has_bias else {})
    return sizes == known and not getattr(module, "_is_expert_parallel", False)


@dataclass(frozen=True)
class ExpertAdapter:
    """LoRA of rank r on the matrices `of` of a layer's experts: expert e has scaling · B_e A_e beside its own.

    `a` [E·r, I] has the A_e one below the other; of `b` [O, r·E], every E-th column from e on is of B_e. Neither module
    is ever called.
    """

    of: str
    adapter: str
    a: nn.Linear
    b: nn.Linear
    scaling: float
    stacks: tuple[Stack, Stack]

    @property
    def keys(self) -> tuple[str, str]:
        """What `ModuleRule.parameters` calls A and B."""
        return f"{self.of}.{self.adapter}.lora_A", f"{self.of}.{self.adapter}.lora_B"

    def uses(self, parts: Mapping[int, LinearUse]) -> tuple[ExpertsUse, ExpertsUse]:
        """The gradients of A and B, from those of the experts' matrices [O, I] in `parts`: B_eᵀ G_e and G_e A_eᵀ, times
        the scaling."""
        a, b = (stack.matrices(one.weight) for stack, one in zip(self.stacks, (self.a, self.b), strict=True))
        uses_a, uses_b = {}, {}
        for expert, part in parts.items():
            inner = part.dy @ b[expert].to(part.dy.dtype) * self.scaling
            uses_a[expert] = LinearUse(part.x, inner, part.offsets)
            inner = part.x @ a[expert].to(part.x.dtype).T * self.scaling
            uses_b[expert] = LinearUse(inner, part.dy, part.offsets)
        return ExpertsUse(uses_a, self.stacks[0]), ExpertsUse(uses_b, self.stacks[1])


def expert_adapters(model: nn.Module) -> dict[nn.Module, tuple[ExpertAdapter, ...]]:
    """The adapters in use that PEFT has put on stacked matrices, by the module of the experts."""
    # Where nothing has imported PEFT, nothing is wrapped by it.
    wrapper = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)
    found: defaultdict[nn.Module, list[ExpertAdapter]] = defaultdict(list)
    for module in model.modules():
        if wrapper is None or not isinstance(module, wrapper) or module.num_experts == 1:
            continue
        experts = module.get_base_layer()
        for name in module.active_adapters if are_experts(experts) and not module.disable_adapters else ():
            if name in module.lora_A:
                layouts = Stack("rows", module.num_experts), Stack("columns", module.num_experts)
                a, b = module.lora_A[name], module.lora_B[name]
                adapter = ExpertAdapter(module.parameter_name, name, a, b, module.scaling[name], layouts)
                found[experts].append(adapter)
    return {experts: tuple(adapters) for experts, adapters in found.items()}


def experts_forward(
    module: Any,
    linear: ExpertLinear,
    chosen_by: Sequence[tuple[int, Tensor]],
    hidden_states: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What `module` computes of hidden_states [N, H] with top_k_weights [N, k], expert by expert.

    `chosen_by` is `chosen_by_expert` of its top_k_index. Sums over a token's experts are taken in the wider of both
    dtypes.
    """
    dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
    result = torch.zeros_like(hidden_states, dtype=dtype)
    activation: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    weights, k = top_k_weights.reshape(-1), top_k_weights.shape[-1]
    for expert, chosen in chosen_by:
        rows = chosen // k
        inner = activation(linear(_up(module), expert, rows, hidden_states[rows]))
        result = result.index_add(0, rows, (linear(_DOWN, expert, rows, inner) * weights[chosen, None]).to(dtype))
    return result.to(hidden_states.dtype)


def chosen_by_expert(top_k_index: Tensor, num_experts: int) -> list[tuple[int, Tensor]]:
    """Of each expert that any token goes to, the positions n·k + j in top_k_index [N, k], in the order of tokens."""
    ordered, positions = top_k_index.reshape(-1).sort(stable=True)
    experts, counts = ordered.unique_consecutive(return_counts=True)
    chosen = positions.split(counts.tolist())
    return [(expert, rows) for expert, rows in zip(experts.tolist(), chosen, strict=True) if expert < num_experts]


def expert_matrix(module: Any, name: str, expert: int) -> tuple[Tensor, Tensor | None]:
    """The matrix [O, I] of one expert and its bias [O], where it has one."""
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return (weight.T if module.is_transposed else weight), bias


def _up(module: Any) -> str:
    return _UP[0] if module.has_gate else _UP[1]


@dataclass
class ExpertStack:
    """The gradient of the matrices `name` of a layer's experts, and what follows from it for their biases and adapters,
    one expert after the other.

    `hit` experts have tokens in this batch; with the last of them all goes to `deliver`.
    """

    rule: ModuleRule
    name: str
    module: Any
    rows: RowMap
    hit: int
    deliver: Callable[[str, Use], None]
    impl: str
    parts: dict[int, LinearUse] = field(default_factory=dict)

    def receive(self, expert: int, tokens: Tensor, x: Tensor, dy: Tensor) -> None:
        """x [n, I] and dy [n, O] at the flat positions `tokens`, int64 [n]."""
        kept, offsets = self.rows.of_tokens(tokens, dy, self.rule.module_name)
        self.parts[expert] = LinearUse(x[kept], dy[kept], offsets)
        if len(self.parts) == self.hit:
            self._finish()

    def _finish(self) -> None:
        bias = self.rule.parameters.get(f"{self.name}_bias")
        if bias is not None:
            sums = {e: ops.example_sums(part.dy, part.offsets, impl=self.impl) for e, part in self.parts.items()}
            shape = getattr(self.module, f"{self.name}_bias").shape
            grad = next(iter(sums.values())).new_zeros(self.rows.size, *shape)
            for expert, value in sums.items():
                grad[:, expert] = value
            self.deliver(bias, DenseUse(grad))
        for adapter in self.rule.adapters:
            if adapter.of == self.name:
                for key, use in zip(adapter.keys, adapter.uses(self.parts), strict=True):
                    if key in self.rule.parameters:
                        self.deliver(self.rule.parameters[key], use)
        weight = self.rule.parameters.get(self.name)
        if weight is not None:
            if self.module.is_transposed:
                self.parts = {e: LinearUse(part.dy, part.x, part.offsets) for e, part in self.parts.items()}
            self.deliver(weight, ExpertsUse(self.parts))
