"""Whole models on the device for `benchmarks.gpu`: scoring against plain forward + backward of the same batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from montessori import AdamWState, AdamWStep, InfluenceEstimator, calibration, cuda
from montessori.batching import collate, make_batches
from montessori.encoding import encode_rows
from montessori.optim_state import ParameterState
from montessori.trial import milliseconds

TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BATCH_TOKENS = {"TinyLlama": 16384, "8B": 2048}
NUM_ROWS = {"TinyLlama": 64, "8B": 16, "small": 24}
# Tokens of a row; the first quarter of a row is its prompt.
ROW_TOKENS = 512


def score(backend: str, lengths: str = "equal") -> dict[str, Any]:
    """`InfluenceEstimator.score` on TinyLlama's shape against plain forward + backward of the same batches."""
    model = random_llama(torch.bfloat16, **TINYLLAMA)
    rows = random_rows(NUM_ROWS["TinyLlama"], TINYLLAMA["vocab_size"], lengths)
    plain = plain_milliseconds(model, rows, BATCH_TOKENS["TinyLlama"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
    ids = torch.tensor([rows[0]["input_ids"]], device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    estimator = InfluenceEstimator(model, optimizer, rows[:8], backend=backend, pilot=2)
    measured = _scored(estimator, rows, plain, BATCH_TOKENS["TinyLlama"])
    return {"rows": [{"backend": backend, "lengths": lengths, **measured}]}


def score_8b() -> dict[str, Any]:
    """`InfluenceEstimator.score` on Llama-3-8B's shape, weights, m, v and q in bfloat16, on one 80 GB card."""
    model = random_llama(torch.bfloat16, **LLAMA_8B)
    rows = random_rows(NUM_ROWS["8B"], LLAMA_8B["vocab_size"])
    plain = plain_milliseconds(model, rows, BATCH_TOKENS["8B"])
    step = AdamWStep(lr=5e-6, step=12)
    state = AdamWState(
        {
            name: ParameterState(step, torch.randn_like(p).mul_(1e-4), torch.rand_like(p).mul_(1e-8).add_(1e-10))
            for name, p in model.named_parameters()
        }
    )
    settings = {"method": "first_order", "reference_dtype": "model", "reference_batch_tokens": BATCH_TOKENS["8B"]}
    estimator = InfluenceEstimator(model, state, rows[:4], **settings)
    return {"rows": [{"backend": "auto", **_scored(estimator, rows, plain, BATCH_TOKENS["8B"])}]}


def fidelity() -> dict[str, Any]:
    """Influences of a small model against its own real float32 steps, by dtype of candidates, of state, by backend.

    The whole estimator on the device. Both sides start from the weights rounded to the candidates' dtype.
    """
    model = random_llama(torch.float32, **SMALL)
    rows = random_rows(NUM_ROWS["small"], SMALL["vocab_size"], "mixed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state, measured = AdamWState.from_optimizer(model, optimizer), []
    for operand in (torch.float32, torch.bfloat16):
        narrow = copy.deepcopy(model).to(operand)
        for held in (torch.float32, torch.bfloat16):
            entries = {name: ParameterState(entry.step, *(tensor.to(held) for _, tensor in entry.tensors()))
                       for name, entry in state.items()}  # fmt: skip
            for backend in _backends(operand):
                estimator = InfluenceEstimator(
                    narrow, AdamWState(entries), rows[::4], backend=backend, lr=5e-6, pilot=4
                )
                agreement = estimator.audit(rows, k=len(rows)).agreement["reference"]
                names = {"candidates": str(operand), "state": str(held), "backend": backend}
                measured.append({**names, **agreement.to_dict()})
    return {"rows": measured}


def _backends(operand: torch.dtype) -> Iterator[str]:
    yield from ("reference", "triton")
    if operand in cuda.OPERANDS and set(calibration.kernels()) - {"triton"}:
        yield "cuda"


def random_llama(dtype: torch.dtype, **shape: int) -> torch.nn.Module:
    """A model of the Llama family with random weights on the device."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=False, **shape)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_rows(count: int, vocabulary: int, lengths: str = "equal") -> list[dict[str, list[int]]]:
    """Rows of ROW_TOKENS tokens, or with lengths="mixed" of half as many to as many; all but a quarter has labels."""
    rows = []
    for index in range(count):
        length = ROW_TOKENS if lengths == "equal" else ROW_TOKENS // 2 + index * (ROW_TOKENS // 2) // count
        ids = torch.randint(0, vocabulary, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return rows


def plain_milliseconds(model: torch.nn.Module, rows: list[dict[str, list[int]]], batch_tokens: int) -> float:
    """Forward and backward of all rows in the batches of `InfluenceEstimator.score`, all weight gradients included."""
    examples = encode_rows(rows, None, max_length=ROW_TOKENS).examples
    batches = [collate(batch).to(model.device) for batch in make_batches(examples, batch_tokens)]

    def run() -> None:
        for batch in batches:
            model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
            model.zero_grad()

    return milliseconds(run, repeats=5)


def _scored(
    estimator: InfluenceEstimator, rows: list[dict[str, list[int]]], plain: float, batch_tokens: int
) -> dict[str, Any]:
    # What is done once may need more than the scores, and has to fit as well.
    torch.cuda.reset_peak_memory_stats()
    estimator.prepare(rows)
    ours = milliseconds(lambda: estimator.score(rows, batch_tokens=batch_tokens), repeats=5)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        "plain tokens/s": tokens / plain * 1e3,
        "score tokens/s": tokens / ours * 1e3,
        "speed": plain / ours,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
    }
