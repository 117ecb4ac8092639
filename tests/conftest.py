from __future__ import annotations

import gc
import json
import os
import sys

import pytest
import torch
from support import make_student, make_text_rows

from montessori import cli

# Their assertions tell both sides, as those of test modules do.
pytest.register_assert_rewrite("capturing", "op_cases")
# Tiny models gain nothing from threads and lose much to their barriers on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# The pretended GPU would send processes to look for a real one.
os.environ["MONTESSORI_CALIBRATE"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: at the end the other processes would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def pytest_collection_finish() -> None:
    """What the imports have made stays: searches for garbage, of which every training makes some, pass over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """A tiny student on disk: model, tokenizer with a chat template, optimizer state after two steps."""
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def files(tmp_path):
    paths = {"candidates": tmp_path / "candidates.jsonl", "reference": tmp_path / "reference.jsonl"}
    for seed, path in enumerate(paths.values()):
        path.write_text("".join(json.dumps(row) + "\n" for row in make_text_rows(12, seed=seed)))
    return paths


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; returns its exit status, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["montessori", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
