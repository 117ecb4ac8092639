"""Every section of the GPU benchmark, and whether its checks find kernels that are wrong; see tests/pretend_gpu.py.

`tests/test_triton.py` runs this file in a process of its own: what it changes in torch stays there.
"""

from __future__ import annotations

import inspect
import json
import pkgutil

import pytest
import torch
from pretend_gpu import CHECKED, once, pretended_gpu

from benchmarks import gpu_checks, gpu_models, gpu_sections
from montessori import calibration, cuda, tiles, trial

# Sections that need the CUDA library.
NEEDING_CUDA = (*calibration.HOPPER_KERNELS, "cuda")
LITTLE = {
    "SHAPES": dict.fromkeys(gpu_sections.SHAPES, (24, 40)),
    "LENGTHS": (8, 16),
    "PACKED_TOKENS": 32,
    "MIXED": (3, 7),
    "COPIED": 64,
    "SQUARE": 8,
    "ELEMENTS": 1 << 10,
    "TOKENS": 16,
    "FEATURES": 8,
    "WORDS": 70,
}
LITTLE_CHECKS = {"SHAPE": (40, 30), "LENGTHS": (3, 0, 7), "FEATURES": 24, "WORDS": 331, "BLOCK_WORDS": 160}
LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def little(monkeypatch):
    """Sections of the benchmark at small sizes, in this process, without times."""
    for constant, value in LITTLE.items():
        monkeypatch.setattr(gpu_sections, constant, value)
    for constant, value in CHECKED.items():
        monkeypatch.setattr(trial, constant, value)
    for constant, value in LITTLE_CHECKS.items():
        monkeypatch.setattr(gpu_checks, constant, value)
    monkeypatch.setattr(tiles, "WORD_BLOCKS", 2)
    for module in (gpu_models, gpu_sections, trial):
        monkeypatch.setattr(module, "milliseconds", once)
    # The device is pretended in this process alone.
    monkeypatch.setattr(gpu_sections, "in_processes", lambda parts: [row for part in parts.values() for row in part()])


@pytest.mark.parametrize("name", gpu_sections.SECTIONS)
def test_every_section_of_the_gpu_benchmark_runs(name, little, monkeypatch):
    if name.endswith(NEEDING_CUDA) and cuda.load_error() is not None:
        pytest.skip(cuda.load_error())
    for constant, value in {"TINYLLAMA": LLAMA, "LLAMA_8B": LLAMA, "SMALL": LLAMA, "ROW_TOKENS": 8}.items():
        monkeypatch.setattr(gpu_models, constant, value)
    monkeypatch.setattr(gpu_models, "BATCH_TOKENS", {"TinyLlama": 48, "8B": 24})
    monkeypatch.setattr(gpu_models, "NUM_ROWS", {"TinyLlama": 5, "8B": 3, "small": 2})
    monkeypatch.setattr(tiles, "RIVALS", tiles.RIVALS[:1])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pretended_gpu():
        rows = gpu_sections.SECTIONS[name].work()["rows"]
    assert rows
    assert json.loads(json.dumps(rows)) == rows


def lost(name):
    """A launch that leaves out the last column of what it writes."""

    def wrong(launch, given):
        launch(**given)
        given[name][..., -1] = 0

    return wrong


def taking(name, change):
    """A launch that takes something else for an argument."""
    return lambda launch, given: launch(**given | {name: change(given[name])})


def inexact(launch, given):
    launch(**given)
    given["total"] *= 1.02


def lost_at_odd_widths(launch, given):
    (lost("grad") if given["grad"].shape[1] % 16 else taking("tile", lambda tile: tile))(launch, given)


def of_given(change):
    return lambda tensor: None if tensor is None else change(tensor)


# Where a kernel is launched, how wrongly, and what is wrong by it.
FAULTS = {
    "a tile of a ready gradient": ("elementwise.adam_influence_launch", lost("partial"), {"ready", "table"}),
    "weights of a step": ("elementwise.adam_step_launch", lost("param"), {"step"}),
    "moments of a step": ("elementwise.adam_step_launch", taking("exp_avg", torch.zeros_like), {"step"}),
    "a tile of a row": ("embedding.row_changes_launch", lost("partial"), {"table", "rows changed elsewhere too"}),
    "a gradient from elsewhere": (
        "embedding.row_changes_launch", taking("base", of_given(torch.zeros_like)), {"rows changed elsewhere too"}),
    "the place of a gradient from elsewhere": (
        "embedding.row_changes_launch", taking("base_at", of_given(lambda at: at.roll(1))),
        {"rows changed elsewhere too"}),
    "a feature of sums": ("rows.example_sums_launch", lost("sums"), {"sums"}),
    "the exponential": (
        "cross_entropy.linear_cross_entropy_launch", inexact, {"token loss", "normaliser", "logits gradient"}),
    "a target": ("cross_entropy.linear_cross_entropy_launch", lost("target_logit"), {"token loss"}),
    "the place of a block": (
        "cross_entropy.logits_gradient_launch", taking("first_word", lambda word: 0), {"logits gradient"}),
    "a word of an odd block": ("cross_entropy.logits_gradient_launch", lost_at_odd_widths, {"logits gradient"}),
}  # fmt: skip


def spoil(monkeypatch, fault: str) -> set[str]:
    """Make a kernel wrong; what is wrong by it."""
    place, wrong, told = FAULTS[fault]
    launch = pkgutil.resolve_name(f"montessori.kernels.triton.{place.replace('.', ':')}")
    names = list(inspect.signature(launch).parameters)
    monkeypatch.setattr(
        f"montessori.kernels.triton.{place}",
        lambda *given, **named: wrong(launch, dict(zip(names, given, strict=False)) | named),
    )
    return told


@pytest.mark.parametrize("fault", FAULTS)
def test_the_section_that_checks_triton_finds_what_is_wrong(fault, little, monkeypatch):
    found = []

    def checked(parts):
        found.extend(row for name, part in parts.items() if name.startswith(kind) for row in part())
        return found

    monkeypatch.setattr(gpu_sections, "in_processes", checked)
    kind = "head" if FAULTS[fault][0].startswith("cross_entropy") else "small"
    told = spoil(monkeypatch, fault)
    with pretended_gpu(), pytest.raises(SystemExit, match="wrong results"):
        gpu_sections.checks_triton()
    # In every dtype.
    assert {row["kernel"] for row in found if not row["right"]} == told
    assert not any(row["right"] for row in found if row["kernel"] in told)


def test_a_head_is_not_timed_that_is_wrong(little, monkeypatch):
    spoil(monkeypatch, "the exponential")
    with pretended_gpu(), pytest.raises(SystemExit, match="wrong results in 1 of 2 cases"):
        gpu_sections.head()
