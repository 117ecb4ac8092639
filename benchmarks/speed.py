"""Time of scoring against plain forward + backward over the same batches, interleaved in one process.

    python -m benchmarks.speed --candidates seed_tasks_175.jsonl --reference reference_256.jsonl

Two yardsticks. Plain: what training does without its optimizer step, the ordinary Hugging Face forward on the padded
batch, loss over the response, `backward()` with all weight gradients. Trimmed: the same with the head on the labelled
positions alone, as scoring has it. Scoring adds the Adam map and the dot product with q and leaves out autograd's
weight gradients; `sampled` does so for a quarter of each weight, `clipped` with the norms that clipping needs first.
What is computed once for all candidates (reference gradient, anchor, proof of the capture) is timed apart.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from benchmarks.common import (
    MAX_LENGTH,
    has_amx,
    interleaved,
    load_data,
    parser,
    ratios,
    seconds,
    spread_batches,
    warm_student,
    write_result,
)
from montessori import InfluenceEstimator
from montessori.batching import Example, collate
from montessori.losses import response_loss
from montessori.models import load_model
from montessori.runs import DTYPES

SAMPLE = 0.25
# Trainer's default.
MAX_GRAD_NORM = 1.0
# As `score` has it; larger batches have a result file of their own.
BATCH_TOKENS = 4096


def plain_pass(model: nn.Module, batches: Sequence[Sequence[Example]]) -> None:
    for batch in map(collate, batches):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        targets = batch.labels[:, 1:].flatten()
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100).backward()
        model.zero_grad()


def trimmed_pass(model: nn.Module, batches: Sequence[Sequence[Example]]) -> None:
    for batch in map(collate, batches):
        response_loss(model, batch).sum().backward()
        model.zero_grad()


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batches", type=int, default=1, help="how many batches are scored, spread over the lengths")
    options.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--backend", default="auto", help="implementation of montessori.ops")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--precision", choices=["highest", "medium"], default="highest", help="of float32 products")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.precision)
    everything, _, reference = load_data(arguments)
    checkpoint = warm_student(everything, arguments)
    model, tokenizer = load_model(checkpoint, dtype=DTYPES[arguments.dtype])
    candidates, batches = spread_batches(everything, tokenizer, arguments)
    examples = [example for batch in batches for example in batch]
    settings = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "truncation": "right", "backend": arguments.backend}
    estimator = InfluenceEstimator(model, checkpoint, reference, **settings)
    once = seconds(lambda: estimator.prepare(candidates))
    results = {}

    def score(chosen: InfluenceEstimator, name: str) -> None:
        results[name] = chosen.score(candidates, batch_tokens=arguments.batch_tokens).influence

    arms: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_pass(model, batches),
        "trimmed": lambda: trimmed_pass(model, batches),
        "score": lambda: score(estimator, "score"),
    }
    if arguments.backend == "auto":
        # Shares the preparation of the other: only the sample differs.
        sampled = copy.copy(estimator)
        sampled.options = replace(estimator.options, sample=SAMPLE)
        arms["sampled"] = lambda: score(sampled, "sampled")
    clipped = copy.copy(estimator)
    clipped.options = replace(estimator.options, max_grad_norm=MAX_GRAD_NORM)
    arms["clipped"] = lambda: score(clipped, "clipped")
    times = interleaved(arms, arguments.repeats)
    compared = [(of, to) for of in ("score", "sampled") for to in ("plain", "trimmed") if of in times]
    compared.append(("clipped", "score"))
    result = {
        "seconds": {**times, "once": once},
        "speed": {f"{of}/{to}": ratios(times, of, to) for of, to in compared},
        "tokens": sum(example.num_tokens for example in examples),
        "label_tokens": sum(example.num_label_tokens for example in examples),
        "padded_tokens": sum(len(batch) * batch[0].num_tokens for batch in batches),
        "backend": arguments.backend,
    }
    if "sampled" in results:
        result["sampled_spearman"] = float(spearmanr(results["score"], results["sampled"]).statistic)
    kind = "" if arguments.precision == "highest" else f"_{arguments.precision}"
    kind += "" if arguments.batch_tokens <= BATCH_TOKENS else f"_{arguments.batch_tokens}"
    kind += f"_{arguments.threads}t" + ("_amx" if has_amx() else "")
    path = write_result(f"speed_{arguments.backend}_{arguments.dtype}{kind}", arguments, result)
    show(result, path)


def show(result: dict, path: object) -> None:
    table = Table(title=f"{result['tokens']} tokens, {result['label_tokens']} with a label")
    for column in ("", "median s", "tokens/s"):
        table.add_column(column)
    for name, times in result["seconds"].items():
        median = statistics.median(times) if isinstance(times, list) else times
        table.add_row(name, f"{median:.2f}", f"{result['tokens'] / median:.0f}" if name != "once" else "")
    console = Console()
    console.print(table)
    for name, ratio in result["speed"].items():
        console.print(f"speed {name}: {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
    if "sampled_spearman" in result:
        console.print(f"Spearman of sampled against all tiles: {result['sampled_spearman']:.4f}")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
