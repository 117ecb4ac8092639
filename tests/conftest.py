from __future__ import annotations

import pytest
from support import make_student


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """A tiny student on disk: model, tokenizer with a chat template, optimizer state after two steps."""
    return make_student(tmp_path_factory.mktemp("student"))
