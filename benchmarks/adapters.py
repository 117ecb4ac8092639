"""PEFT's adapters on a small model in float64: which rule captures them, and how far scores are from real steps.

    python -m benchmarks.adapters

An error that falls with the learning rate is the curvature of the loss; one that stays is a wrong derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import nn

from benchmarks.architectures import VOCABULARY, plain_loss, rows, run
from montessori import InfluenceEstimator
from montessori.errors import MontessoriError

RATES = (1e-4, 1e-6)
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
LINEAR = {"target_modules": ["q_proj", "fc1", "fc2"]}
BOTH_ENDS = ["embed_tokens", "lm_head"]


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **LINEAR, **settings})


ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rsLoRA, biases": lambda: lora(use_rslora=True, lora_bias=True, bias="all"),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "LoRA on embedding and head": lambda: lora(target_modules=[*BOTH_ENDS, "q_proj"]),
    "modules_to_save": lambda: lora(modules_to_save=BOTH_ENDS),
    "trainable_token_indices": lambda: lora(trainable_token_indices=[3, 5, 9]),
    "target_parameters": lambda: lora(target_modules=[], target_parameters=["fc1.weight"]),
    "DoRA": lambda: lora(use_dora=True),
    "DoRA on embeddings": lambda: lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["self_attn_layer_norm", "final_layer_norm"]),
    "VeRA": lambda: peft.VeraConfig(r=4, **ATTENTION),
    "MiSS": lambda: peft.MissConfig(r=4, **ATTENTION),
    "RoAd": lambda: peft.RoadConfig(group_size=8, **ATTENTION),
    "VBLoRA": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=4, r=2, **ATTENTION),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "LoKr": lambda: peft.LoKrConfig(r=4, **ATTENTION),
    "HRA": lambda: peft.HRAConfig(r=4, **ATTENTION),
    "LoHa": lambda: peft.LoHaConfig(r=4, **ATTENTION),
    "AdaLoRA": lambda: peft.AdaLoraConfig(r=4, total_step=10, **ATTENTION),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, **ATTENTION),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, **ATTENTION),
    "SHiRA": lambda: peft.ShiraConfig(r=2, **ATTENTION),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=16, **ATTENTION),
    "C3A": lambda: peft.C3AConfig(block_size=8, **ATTENTION),
}


def build(adapter: Any) -> nn.Module:
    torch.manual_seed(0)
    # Its norms compute in float64, which those of newer models do not.
    base = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=False, init_std=0.2,
        dropout=0.0,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.OPTForCausalLM(base), adapter).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def check(name: str) -> dict[str, Any]:
    """Rules by number of values, and the largest error by method and learning rate, over the spread of influences."""
    model = build(ADAPTERS[name]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for row in rows(6, seed=99):
        plain_loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad()
    candidates, references = rows(8, seed=1), rows(4, seed=2)

    def score(method: str, lr: float) -> tuple[np.ndarray, InfluenceEstimator]:
        estimator = InfluenceEstimator(model, optimizer, references, method=method, lr=lr)
        return estimator.score(candidates).influence, estimator

    errors: dict[str, list[float]] = {"anchored": [], "first_order": []}
    try:
        for rate in RATES:
            want, _ = score("exact", rate)
            for method, found in errors.items():
                got, estimator = score(method, rate)
                found.append(float(np.abs(got - want).max() / np.ptp(want)))
    except MontessoriError as error:
        return {"refused": str(error)}
    coverage = {rule: int(count) for rule, count in estimator.coverage.items()}
    return {"coverage": coverage, "errors": errors, "error": errors["anchored"][-1]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(__doc__, "adapters", list(ADAPTERS), check)
