"""Scores where torch's switch lets products round their factors, as TF32 on a GPU or "medium" with matrix units do.

Emulated, so that every machine runs it: layers round their factors to bfloat16 while the switch stands at "medium".
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import make_model, make_rows, warm_optimizer
from torch.overrides import TorchFunctionMode

from montessori import InfluenceEstimator, products

ROWS, REFERENCES = make_rows(6, seed=1), make_rows(4, seed=2)


class MatrixUnits(TorchFunctionMode):
    """`F.linear` of factors rounded to bfloat16 where the switch allows it."""

    rounded = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[0].dtype is torch.float32 and torch.get_float32_matmul_precision() == "medium":
            MatrixUnits.rounded += 1
            x, weight, *bias = args
            args = (*((one + (one.bfloat16().float() - one).detach()) for one in (x, weight)), *bias)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def warm() -> tuple:
    model = make_model("llama_tied", torch.float32)
    return model, warm_optimizer(model, lr=3e-5)


@pytest.fixture(scope="module")
def unrounded(warm) -> np.ndarray:
    return influence(warm, "exact")


@pytest.fixture
def medium(warm, unrounded, monkeypatch):
    monkeypatch.setattr(products, "torch_rounds_products", lambda: torch.get_float32_matmul_precision() == "medium")
    torch.set_float32_matmul_precision("medium")
    MatrixUnits.rounded = 0
    with MatrixUnits():
        yield
    torch.set_float32_matmul_precision("highest")
    assert MatrixUnits.rounded


def influence(warm: tuple, method: str) -> np.ndarray:
    settings = {"method": method, "backend": "reference", "pilot": 2}
    return InfluenceEstimator(*warm, REFERENCES, **settings).score(ROWS).influence


def test_real_steps_are_not_rounded(warm, unrounded, medium):
    np.testing.assert_array_equal(influence(warm, "exact"), unrounded)
    # The owner's switch is as it was.
    with torch.no_grad():
        warm[0](torch.tensor([ROWS[0]["input_ids"]]))


def test_the_anchor_s_losses_are_not_rounded(warm, unrounded, medium):
    # Its gradients are, by one part in 2^9 for each factor.
    assert abs(influence(warm, "anchored") - unrounded).max() <= 2**-6 * abs(unrounded).max()
