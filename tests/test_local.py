"""Norms known by what they compute: the fast way is taken where it is right, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from montessori.local import local_gradients
from montessori.rowmap import Rows
from montessori.rules import LOCAL, ModuleRule

WIDTH, EPS = 48, 1e-5


class Norm(nn.Module):
    """A norm with a weight of its own formula."""

    def __init__(self, formula, eps: float = EPS) -> None:
        super().__init__()
        self.weight, self.formula, self.eps = nn.Parameter(torch.randn(WIDTH)), formula, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self.weight, x.float()).to(x.dtype)


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def in_groups(x: Tensor) -> Tensor:
    return F.rms_norm(x.unflatten(-1, (2, -1)), (WIDTH // 2,), None, EPS).flatten(-2)


NORMS = {
    "llama": lambda: LlamaRMSNorm(WIDTH, EPS),
    "gemma": lambda: Gemma2RMSNorm(WIDTH, EPS),
    "qwen3": lambda: Qwen3RMSNorm(WIDTH, EPS),
    "torch": lambda: nn.RMSNorm(WIDTH, eps=EPS),
}
# What looks like a norm with ε and is none, or not with this ε.
OTHERS = {
    "layer_norm_of_its_own": lambda: Norm(lambda w, x: w * F.layer_norm(x, (WIDTH,), eps=EPS)),
    "other_epsilon": lambda: Norm(lambda w, x: w * x * torch.rsqrt(mean_square(x) + 1.001 * EPS)),
    "epsilon_outside_the_root": lambda: Norm(lambda w, x: w * x / (mean_square(x).sqrt() + EPS)),
    "weight_through_a_function": lambda: Norm(lambda w, x: F.softplus(w) * x * torch.rsqrt(mean_square(x) + EPS)),
    "in_groups": lambda: Norm(lambda w, x: w * in_groups(x)),
    "clamped": lambda: Norm(lambda w, x: w * (x * torch.rsqrt(mean_square(x) + EPS)).clamp(-1, 1)),
}  # fmt: skip


def gradients(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight gradients [B, F] as captured, and a loop of autograd in float32, of rows of very different size."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(11, WIDTH, generator=generator) for _ in range(2))
    x, dy = (x * torch.logspace(-3, 2, 11)[:, None]).to(dtype), dy.to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(WIDTH, generator=generator))
    module = module.to(dtype)
    offsets = torch.tensor([0, 4, 4, 11])
    rule = ModuleRule(LOCAL, "norm", {"weight": "norm.weight"})
    with torch.enable_grad():
        got = local_gradients(rule, module, x, Rows(dy, offsets), "auto")[0]
    module = module.float()
    want = []
    for low, high in [(0, 4), (4, 4), (4, 11)]:
        y = module(x[low:high].float())
        want.append(torch.autograd.grad(y, module.weight, dy[low:high].float())[0])
    return got, torch.stack(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS | OTHERS)
def test_gradients_of_norms_are_those_of_autograd(name, dtype):
    got, want = gradients((NORMS | OTHERS)[name](), dtype)
    # Normed values are 7 at most in rows of 48; a module of bfloat16 may round them, and its weight's way to them.
    roundings = 7 * 8 * torch.finfo(dtype).eps
    assert (got - want).abs().max() <= roundings * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS | OTHERS)
def test_a_norm_is_run_again_only_where_it_is_no_rms_norm(name, dtype):
    rows = []

    def count(module, args, output):
        rows.append(len(args[0]))

    module = (NORMS | OTHERS)[name]()
    module.register_forward_hook(count)
    gradients(module, dtype)
    # The truth's loop runs it on 4, 0 and 7 rows and a probe on 3: 11, or 4, 0 and 7 once more, where the probe failed.
    again = [size for size in rows if size != 3] != [4, 0, 7]
    assert again == (name in OTHERS)
