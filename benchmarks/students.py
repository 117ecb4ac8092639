"""Students and examples of the benchmarks against peers, naive loops and real steps.

`smollm2` is SmolLM2-135M-Instruct; `tiny` a model of its family with four layers and random weights, taught for a
few steps so that its gradients are not noise. Both are handed on as a checkpoint of a short AdamW warm-up.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import load_data, warm_student
from montessori.batching import Example, collate
from montessori.encoding import encode_rows
from montessori.errors import ArgumentError
from montessori.losses import response_loss
from montessori.models import checkpoint_name, load_model, load_tokenizer
from montessori.warmup import warmup

MODELS = ("smollm2", "tiny")
TINY_VOCABULARY = 4096
# The same for every benchmark, so that they share one warm-up.
WARMUP_LENGTH = 128
# Rows of the candidates' file that may be scored by default; the warm-up sees the others.
SCORED_ROWS = 32


def add_model_options(options: argparse.ArgumentParser, scored: int, references: int) -> None:
    """Options of a benchmark that scores a few examples on one of `MODELS`."""
    options.set_defaults(num_candidates=SCORED_ROWS, num_references=references)
    options.add_argument("--model", choices=MODELS, default="smollm2")
    options.add_argument("--scored", type=int, default=scored, help="how many of the candidates are scored")
    options.add_argument("--max-length", type=int, default=128, help="tokens at which examples are cut")


def examples_of(arguments: argparse.Namespace) -> tuple[list[Example], list[Example], list[Example]]:
    """Candidates to score and references, cut at `max_length` tokens, and examples for warm-ups of the tiny model."""
    if arguments.scored > arguments.num_candidates:
        raise ArgumentError(
            f"--scored {arguments.scored}: expected at most --num-candidates {arguments.num_candidates}, "
            "the rows that the warm-up does not see: raise it"
        )
    everything, candidates, reference = load_data(arguments)
    rest = replace(everything, rows=everything.rows[arguments.num_candidates :])
    tokenizer = load_tokenizer(checkpoint_name("smollm2-135m"))
    lists = []
    for rows, length in ((candidates, arguments.max_length), (reference, arguments.max_length), (rest, WARMUP_LENGTH)):
        examples = encode_rows(rows, tokenizer, max_length=length, truncation="right").examples
        lists.append([_small(example) for example in examples] if arguments.model == "tiny" else examples)
    return lists[0][: arguments.scored], lists[1], lists[2]


def _small(example: Example) -> Example:
    """Token ids folded into the vocabulary of the tiny model."""
    labels = torch.where(example.labels < 0, example.labels, example.labels % TINY_VOCABULARY)
    return Example(example.input_ids % TINY_VOCABULARY, labels, example.index)


def make_tiny(examples: list[Example], steps: int = 40) -> nn.Module:
    """Four layers of the SmolLM2 family, 4.1 M random weights, after `steps` AdamW steps at lr 1e-3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, examples, steps)
    return model.eval()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, examples: list[Example], steps: int) -> None:
    """`steps` optimizer steps of 8 examples each, in order, over and over."""
    batches = [examples[i : i + 8] for i in range(0, len(examples) - 7, 8)]
    for step in range(steps):
        optimizer.zero_grad()
        response_loss(model, collate(batches[step % len(batches)])).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def student_checkpoint(arguments: argparse.Namespace, examples: list[Example]) -> Path:
    """Checkpoint of the model after 12 AdamW steps, with lr rising towards 5e-6, on rows that are not scored."""
    if arguments.model == "smollm2":
        return warm_student(load_data(arguments)[0], arguments)
    tokenizer = load_tokenizer(checkpoint_name("smollm2-135m"))
    out = arguments.work / "warmup_tiny"
    settings = {"max_steps": 12, "batch_size": 8, "per_device_train_batch_size": 8, "progress": False}
    return warmup(make_tiny(examples), tokenizer, examples, out, **settings)


def load_student(checkpoint: Path) -> nn.Module:
    """The model of a checkpoint, float32, in eval mode."""
    return load_model(checkpoint)[0]
