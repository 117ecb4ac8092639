"""Generated rows and values over the vocabulary of the tiny tokenizer."""

from __future__ import annotations

import numpy as np
from support import WORDS, make_text_rows

from montessori.loop.signals import Signal


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
