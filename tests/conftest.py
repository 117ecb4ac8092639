from __future__ import annotations

import os

import pytest
import torch
from support import make_student

# Their assertions tell both sides, as those of test modules do.
pytest.register_assert_rewrite("capturing", "op_cases")
# Tiny models gain nothing from threads and lose much to their barriers on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """A tiny student on disk: model, tokenizer with a chat template, optimizer state after two steps."""
    return make_student(tmp_path_factory.mktemp("student"))
