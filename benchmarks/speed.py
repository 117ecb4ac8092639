"""Time of scoring against plain forward + backward over the same batches, interleaved in one process.

    python -m benchmarks.speed --candidates seed_tasks_175.jsonl --reference reference_256.jsonl

Plain forward + backward is what training does without its optimizer step: the ordinary Hugging Face forward on the
padded batch, loss over the response, `backward()` with all weight gradients. Scoring adds the Adam map and the dot
product with q and leaves out autograd's weight gradients. What is computed once for all candidates (reference
gradient, anchor) is timed apart.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import MAX_LENGTH, load_data, parser, warm_student, write_result
from montessori import InfluenceEstimator
from montessori.batching import Example, collate, make_batches
from montessori.encoding import encode_rows
from montessori.models import load_model


def plain_pass(model: nn.Module, batches: Sequence[Sequence[Example]]) -> None:
    for batch in map(collate, batches):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        targets = batch.labels[:, 1:].flatten()
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100).backward()
        model.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch-tokens", type=int, default=2048)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--backend", default="auto", help="implementation of montessori.ops")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    everything, candidates, reference = load_data(arguments)
    checkpoint = warm_student(everything, arguments)
    model, tokenizer = load_model(checkpoint)
    examples = encode_rows(candidates, tokenizer, max_length=MAX_LENGTH, truncation="right").examples
    batches = make_batches(examples, arguments.batch_tokens)
    settings = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "truncation": "right"}
    estimator = InfluenceEstimator(model, checkpoint, reference, backend=arguments.backend, **settings)
    once = seconds(lambda: estimator.prepare(candidates))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cold = seconds(lambda: plain_pass(model, batches))
    plain, ours = [], []
    for _ in range(arguments.repeats):
        plain.append(seconds(lambda: plain_pass(model, batches)))
        ours.append(seconds(lambda: estimator.score(candidates, batch_tokens=arguments.batch_tokens)))
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    tokens = sum(example.num_tokens for example in examples)
    padded = sum(len(batch) * batch[0].num_tokens for batch in batches)
    result = {
        "seconds": {"plain": plain, "score": ours, "once": once, "plain_cold": cold},
        "ratio_median": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "tokens": tokens,
        "padded_tokens": padded,
        "backend": estimator.options.backend,
        "peak_rss_bytes": {"before": before * 1024, "after": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
    }
    path = write_result(f"speed_{arguments.backend}_{arguments.threads}t", arguments, result)
    table = Table(title=f"{len(examples)} candidates, {tokens} tokens, {arguments.threads} threads")
    for column in ("", "median s", "tokens/s", "ratio to plain"):
        table.add_column(column)
    for name, times in (("plain forward + backward", plain), (f"score ({estimator.options.backend})", ours)):
        median = statistics.median(times)
        ratio = f"{result['ratio_median']:.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if times is ours else "1"
        table.add_row(name, f"{median:.2f}", f"{tokens / median:.0f}", ratio)
    table.add_row("once: q, anchor, proof", f"{once:.2f}", "", "")
    console = Console()
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
