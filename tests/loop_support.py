"""Generated rows and values over the vocabulary of the tiny tokenizer; what trainings leave, and how to kill them."""

from __future__ import annotations

import json

import numpy as np
import torch
from support import WORDS, make_text_rows

from montessori.loop import fit
from montessori.loop.signals import Signal
from montessori.models import load_model


def make_generated(prompts: int, siblings: int = 4, seed: int = 0) -> list[dict]:
    """Rows as the generate stage writes them: `siblings` completions of each of `prompts` prompts."""
    rows = []
    for number, text in enumerate(make_text_rows(prompts * siblings, seed=seed)):
        prompt, sibling = divmod(number, siblings)
        prompt_id = f"r1-{prompt:06d}"
        rows.append(
            {
                "id": f"{prompt_id}-{sibling}",
                "prompt_id": prompt_id,
                "sibling": sibling,
                "prompt": f"<|im_start|> user name a colour {WORDS[prompt]} <|im_end|> <|im_start|> assistant ",
                "completion": f"say {text['instruction']}",
                **text,
            }
        )
    return rows


def make_signal(values, drift: float = 0.0) -> Signal:
    values = np.asarray(values, dtype=np.float64)
    return Signal("influence", values, values - drift)


def weights(directory) -> dict[str, torch.Tensor]:
    return load_model(directory)[0].state_dict()


def distance(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / fit.METRICS_FILE).read_text().splitlines()]


class KilledError(Exception):
    pass


def kill_after(monkeypatch, saves: int) -> None:
    """Stop the process's training as a kill would, right after so many checkpoints."""
    from transformers import Trainer

    original, count = Trainer._save_checkpoint, [0]

    def save(self, *arguments):
        original(self, *arguments)
        count[0] += 1
        if count[0] == saves:
            raise KilledError

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
