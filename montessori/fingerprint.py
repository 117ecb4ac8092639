"""Digests that tell whether two runs would compute the same scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from montessori.batching import Example


def examples_digest(examples: Iterable[Example]) -> str:
    """Hash of row numbers and contents, in the order given."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.index}:".encode() + example.digest())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Hash of names, dtypes and values of all parameters."""
    digest = hashlib.blake2b(digest_size=32)
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sets_digest(sets: Mapping[str, Iterable[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in sets.items():
        digest.update(f"{name}={examples_digest(examples)};".encode())
    return digest.hexdigest()
