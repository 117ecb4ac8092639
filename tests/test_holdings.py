"""Digests of loss functions: two are the same when they would compute the same, in this process and in another."""

from __future__ import annotations

import argparse
import datetime
import decimal
import importlib
import json
import re
import subprocess
import sys
import types
from collections import deque
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from pathlib import Path

import datasets
import numpy as np
import pandas
import PIL.Image
import pyarrow
import pytest
import torch
import transformers
import trl
from torch import nn

from montessori.holdings import function_digest


class Slotted:
    __slots__ = ("beta",)

    def __init__(self, beta):
        self.beta = beta


@dataclass(slots=True)
class Settings:
    beta: float


def space(value):
    class Constants:
        beta = value

    return Constants


def module(value):
    made = types.ModuleType("constants_of_mine")
    made.beta, made.helper = value, lambda: 3 * value
    return made


class Head(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.scale, self.helper = torch.tensor(value), partial(pow, value)

    def forward(self, x):
        return x * self.scale


def dpo(value):
    return trl.DPOConfig(output_dir="out", beta=value, use_cpu=True, bf16=False)


def class_with(**parts):
    """An object of a class that inherits, and is called by what its base defines."""
    base = type("Base", (), {"beta": 0, "helper": lambda self: 0, **parts, "__module__": "mine"})
    return type("Mine", (base,), {"__call__": lambda self: self.beta * self.helper() * self[0], "__module__": "mine"})()


HELD = {
    "class attribute": lambda x: class_with(beta=x),
    "static method": lambda x: class_with(helper=staticmethod({0.5: lambda: 1, 0.25: lambda: 2}[x])),
    "class method": lambda x: class_with(helper=classmethod({0.5: lambda cls: 1, 0.25: lambda cls: 2}[x])),
    "property": lambda x: class_with(beta=property({0.5: lambda self: 1, 0.25: lambda self: 2}[x])),
    "special method": lambda x: class_with(__getitem__={0.5: lambda self, i: 1, 0.25: lambda self, i: 2}[x]),
    "cached helper": lambda x: lru_cache({0.5: lambda: 1, 0.25: lambda: 2}[x]),
    "sparse tensor": lambda x: torch.eye(2).mul(x).to_sparse(),
    "pattern": lambda x: re.compile(str(x)),
    "image": lambda x: PIL.Image.new("L", (2, 2), int(100 * x)),
    "deep": lambda x: reduce(lambda inner, _: [inner, {}], range(3000), x),
    "namespace": lambda x: types.SimpleNamespace(beta=x),
    "arguments": lambda x: argparse.Namespace(beta=x),
    "deque": lambda x: deque([x, [1, 2]]),
    "numpy number": np.float32,
    "numpy objects": lambda x: np.array([x, "two", None], dtype=object),
    "decimal": lambda x: decimal.Decimal(str(x)),
    "time": lambda x: datetime.timedelta(seconds=x),
    "slots": Slotted,
    "dataclass": Settings,
    "class as a space of names": space,
    "module of one's own": module,
    "method of a list": lambda x: [x, 1].__getitem__,
    "torch module": Head,
    "series": lambda x: pandas.Series([x, 1.0], index=["a", "b"]),
    "frame": lambda x: pandas.DataFrame({"beta": [x, 1.0], "ids": [[1, 2], [3]]}),
    "table": lambda x: pyarrow.table({"beta": [x, 1.0]}),
    "dataset": lambda x: datasets.Dataset.from_dict({"beta": [x, 1.0]}),
    "config": lambda x: transformers.LlamaConfig(beta=x),
    "settings of TRL": dpo,
}


def loss_with(held):
    return lambda model, batch: held.beta * held.helper() if model is None else getattr(held, "scale", held)


@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
def test_what_a_function_holds_tells_it_from_another(make):
    assert function_digest(loss_with(make(0.5))) == function_digest(loss_with(make(0.5)))
    assert function_digest(loss_with(make(0.5))) != function_digest(loss_with(make(0.25)))


def test_rows_of_a_dataset_count_however_they_are_stored():
    whole = datasets.Dataset.from_dict({"beta": [0.5, 1.0, 2.0]})
    assert function_digest(loss_with(whole.select([0, 2]))) != function_digest(loss_with(whole.select([0, 1])))
    apart = datasets.concatenate_datasets([whole.select([0]), whole.select([1, 2])])
    assert function_digest(loss_with(apart)) == function_digest(loss_with(whole))


@pytest.mark.parametrize("method", ["forward", "inner"])
def test_code_of_classes_counts(method):
    def made(factor):
        def forward(self, x):
            return self.inner(x)

        def inner(self, x):
            return x

        changed = {1: lambda self, x: x + 1, 2: lambda self, x: x + 2}[factor]
        parts = {"forward": forward, "inner": inner, method: changed}
        module = type("Mine", (nn.Module,), {**parts, "__module__": "mine"})()
        plain = type("Plain", (), {"__call__": parts["forward"], "inner": parts["inner"], "__module__": "mine"})()
        return module, plain

    for first, second in zip(made(1), made(2), strict=True):
        assert function_digest(first) != function_digest(second)
    for first, second in zip(made(1), made(1), strict=True):
        assert function_digest(first) == function_digest(second)


def digests() -> dict[str, object]:
    return {name: function_digest(loss_with(make(0.5))) for name, make in HELD.items()} | {"hash": hash("salted")}


def test_digests_are_the_same_in_another_process():
    folder = Path(__file__).parent
    told = subprocess.run(
        [sys.executable, "-c", "import json, test_holdings; print(json.dumps(test_holdings.digests()))"],
        cwd=folder, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": f"{folder}:{folder.parent}", "PYTHONHASHSEED": "1", "HOME": str(Path.home())},
    ).stdout  # fmt: skip
    # By the name that it has there.
    here, there = importlib.import_module("test_holdings").digests(), json.loads(told)
    assert here.pop("hash") != there.pop("hash")
    assert here == there
