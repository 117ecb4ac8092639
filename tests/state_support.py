"""Tiny models with an optimizer that has stepped, and what reading their checkpoints must give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from montessori.checkpoints import read_state
from montessori.errors import StateError
from montessori.optim_state import AdamWState

# Of which neither two nor three ranks divide the parameters.
UNEVEN = {"vocab_size": 67, "intermediate_size": 33, "tie_word_embeddings": True}


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**(shape | changes), num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(config).eval()


def token_rows(count: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 64, (count, 6), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 6, "labels": row} for row in rows]


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        row = torch.tensor([token_rows()[step]["input_ids"]])
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(first: AdamWState, second: AdamWState) -> None:
    assert list(first) == list(second)
    for name, state in first.items():
        assert state.step == second[name].step, name
        for label in ("exp_avg", "exp_avg_sq"):
            one, other = getattr(state, label), getattr(second[name], label)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), name


def assert_reads_as_live(directory: Path, model: nn.Module, optimizer: object) -> AdamWState:
    state = read_state(directory, model)
    assert_same(state, AdamWState.from_optimizer(model, optimizer))
    return state


def refusal(directory: Path, model: nn.Module) -> str:
    with pytest.raises(StateError) as error:
        read_state(directory, model)
    assert "\n" not in str(error.value)
    return str(error.value)


def make_adamw(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, norms without decay."""
    named = list(model.named_parameters())
    decayed = [parameter for name, parameter in named if "norm" not in name]
    rest = [parameter for name, parameter in named if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


class Exploit:
    """Pickles as a call: whoever unpickles it makes the file `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)
