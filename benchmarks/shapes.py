"""Scoring against plain forward + backward for models of other shapes than SmolLM2's.

    python -m benchmarks.shapes

A vocabulary that is a large part of the model: embedding and head of the shape of the model named, the layers in
between too, but only so many of them as keep a run short. Mixtures of experts, linear attention, convolutions and state
spaces: small ones of the architecture named. Random weights and tokens; half of each example's tokens have labels. Arms
as in `benchmarks.speed`, the batches those of `score`.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import interleaved, ratios, write_result
from benchmarks.speed import BATCH_TOKENS, plain_pass, trimmed_pass
from montessori import AdamWState, AdamWStep, InfluenceEstimator
from montessori.batching import make_batches
from montessori.encoding import encode_rows
from montessori.optim_state import ParameterState

WIDTH = {"hidden_size": 768, "vocab_size": 8192}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}
MODELS = {
    "Gemma-3-270M": transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, num_hidden_layers=4, sliding_window=512,
    ),
    "Qwen2.5-0.5B": transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
        num_hidden_layers=2, tie_word_embeddings=True,
    ),
    "Qwen3-MoE, 4 of 32 experts": transformers.Qwen3MoeConfig(
        **WIDTH, **HEADS, head_dim=64, num_hidden_layers=2, num_experts=32, num_experts_per_tok=4,
        moe_intermediate_size=384,
    ),
    "GPT-OSS, 4 of 16 experts": transformers.GptOssConfig(
        **WIDTH, **HEADS, head_dim=64, num_hidden_layers=2, num_local_experts=16, num_experts_per_tok=4,
        intermediate_size=768,
    ),
    "Qwen3.5, linear attention": transformers.Qwen3_5TextConfig(
        **WIDTH, num_hidden_layers=4, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2,
        head_dim=96, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "LFM2, convolutions": transformers.Lfm2Config(
        **WIDTH, **HEADS, num_hidden_layers=3, intermediate_size=2048, full_attn_idxs=[2],
    ),
    "Mamba 2": transformers.Mamba2Config(
        **WIDTH, num_hidden_layers=2, num_heads=24, head_dim=64, state_size=64, n_groups=1, chunk_size=64,
    ),
}  # fmt: skip
TOKENS = {24: 40, 96: 10, 384: 3}  # of an example, and how many such


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        {"model": name, "length": length, "examples": count, **measure(config, length, count, arguments.repeats)}
        for name, config in MODELS.items()
        for length, count in TOKENS.items()
    ]
    path = write_result(f"shapes_{arguments.threads}t", arguments, {"rows": rows})
    table = Table("model", "tokens an example", "score / plain", "score / trimmed")
    for row in rows:
        table.add_row(row["model"], str(row["length"]), *(f"{speed['median']:.2f}" for speed in row["speed"].values()))
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


def measure(config: transformers.PretrainedConfig, length: int, count: int, repeats: int) -> dict:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    candidates, reference = make_rows(count, length, config.vocab_size), make_rows(1, length, config.vocab_size)
    estimator = InfluenceEstimator(model, make_state(model), reference, method="first_order")
    batches = make_batches(encode_rows(candidates, None, max_length=length).examples, BATCH_TOKENS)
    arms = {
        "plain": lambda: plain_pass(model, batches),
        "trimmed": lambda: trimmed_pass(model, batches),
        "score": lambda: estimator.score(candidates, batch_tokens=BATCH_TOKENS),
    }
    times = interleaved(arms, repeats)
    return {"seconds": times, "speed": {f"score/{to}": ratios(times, "score", to) for to in ("plain", "trimmed")}}


def make_rows(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(vocabulary, (count, length)).tolist()
    return [{"input_ids": row, "labels": [-100] * (length // 2) + row[length // 2 :]} for row in ids]


def make_state(model: nn.Module) -> AdamWState:
    """Moments of no particular size: time does not depend on them."""
    step = AdamWStep(lr=1e-5, step=12)
    named = model.named_parameters()
    return AdamWState({name: ParameterState(step, torch.randn_like(p), torch.rand_like(p)) for name, p in named})


if __name__ == "__main__":
    main()
