"""The default engine: transformers, on any device, with randomness of its own for every sequence.

Sequences of a batch share one forward pass per token. Each draws from a generator seeded by its request,
so what shares a batch changes a text only through the rounding of the logits: with the same batches the
same texts come out, bit for bit; with other batches nearly all of them do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from montessori.loop.engines import (
    BatchedEngine,
    EngineSettings,
    Request,
    Sample,
    Sampling,
    context_length,
    leaves_room,
    prompt_ids,
)
from montessori.loop.sequences import Cached, Sequences, proved_sequences
from montessori.models import free_models, load_model
from montessori.options import resolve_device

# A sorted copy of a whole vocabulary costs more than the model's own step; this many tokens nearly always
# hold the nucleus, and where they do not the whole vocabulary is sorted.
_NUCLEUS = 512


class TransformersEngine(BatchedEngine):
    """Decodes up to `batch_size` sequences together; siblings share the pass over their prompt."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.tokenizer: Any = None
        self._model: Any = None
        self._sequences: type[Sequences] = Cached

    def load(self, model: str | os.PathLike[str]) -> None:
        self.release()
        self._model, self.tokenizer = load_model(model, dtype=getattr(torch, self.settings.dtype))
        self._model = self._model.to(resolve_device(self.settings.device, "engine.device"))
        self._sequences = proved_sequences(self._model)

    def fits(self, prompt: str) -> bool:
        return leaves_room(self.tokenizer, prompt, self._limit())

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Prompts of like length together, equal prompts side by side."""
        lengths = map(len, prompt_ids(self.tokenizer, requests, self._limit()))
        keyed = sorted(zip(lengths, range(len(requests)), requests, strict=True), key=lambda item: item[:2])
        ordered = [request for _, _, request in keyed]
        size = self.settings.batch_size
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = ()) -> list[Sample]:
        ids = prompt_ids(self.tokenizer, requests, self._limit())
        sequences = self._sequences(self._model, ids)
        writers = [
            _Writer.start(self, request, prompt, sampling, stop) for request, prompt in zip(requests, ids, strict=True)
        ]
        chooser = _Chooser(sampling, ids, sequences.logits.shape[-1], sequences.logits.device)
        alive = list(range(len(writers)))
        # Rows of the batch; those whose text has ended stay until enough of them have.
        rows = alive
        while alive:
            uniforms = torch.tensor([writers[row].uniform() for row in rows], dtype=torch.float64)
            tokens = chooser.choose(sequences.logits, uniforms)
            for place, token in enumerate(tokens.tolist()):
                writers[rows[place]].write(token)
            alive = [row for row in rows if writers[row].finish is None]
            if alive and len(alive) <= 0.75 * len(rows):
                kept = torch.tensor([place for place, row in enumerate(rows) if writers[row].finish is None])
                sequences.keep(kept)
                chooser.keep(kept)
                rows, tokens = alive, tokens[kept.to(tokens.device)]
            if alive:
                sequences.step(tokens)
        return [writer.sample() for writer in writers]

    def release(self) -> None:
        self._model = None
        free_models()

    def end_tokens(self) -> set[int]:
        """Ids that end a text, by the tokenizer and by the model's generation config."""
        configured = getattr(self._model.generation_config, "eos_token_id", None)
        ends = configured if isinstance(configured, list) else [configured]
        return {token for token in [*ends, self.tokenizer.eos_token_id] if token is not None}

    def room(self, prompt: Sequence[int]) -> int:
        return self._limit() - len(prompt)

    def _limit(self) -> int:
        return context_length(self._model.config.get_text_config(), self.settings.max_length)


class _Chooser:
    """Penalties, temperature, nucleus, and a draw by inverting the distribution function."""

    def __init__(self, sampling: Sampling, ids: Sequence[Sequence[int]], vocabulary: int, device: Any) -> None:
        self.sampling = sampling
        self.written = torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=device)
        self.seen = torch.zeros_like(self.written)
        for row, prompt in enumerate(ids):
            self.seen[row, torch.tensor(list(prompt), device=device)] = True

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.written.device)
        self.written, self.seen = self.written[rows], self.seen[rows]

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """The next token of each sequence, int64 [B], from logits [B, V] and uniforms float64 [B] in [0, 1)."""
        settings = self.sampling
        if settings.repetition_penalty != 1:
            scaled = torch.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
            logits = torch.where(self.seen, scaled, logits)
        if settings.presence_penalty != 0:
            logits = logits - settings.presence_penalty * self.written
        if settings.temperature == 0:
            tokens = logits.argmax(dim=1)
        else:
            tokens = _draw(logits / settings.temperature, settings.top_p, uniforms.to(logits.device))
        rows = torch.arange(len(tokens), device=tokens.device)
        self.written[rows, tokens] = self.seen[rows, tokens] = True
        return tokens


def _draw(logits: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    """Token at the quantile `uniforms` [B] of the nucleus of logits [B, V], in order of falling probability."""
    log_total = logits.double().logsumexp(dim=1, keepdim=True)
    top, order = logits.topk(min(_NUCLEUS, logits.shape[1]), dim=1)
    chosen, covered = _invert(top.double() - log_total, top_p, uniforms)
    tokens = order.gather(1, chosen[:, None])[:, 0]
    short = torch.nonzero(~covered)[:, 0]
    if len(short) and top.shape[1] < logits.shape[1]:
        top, order = logits[short].sort(dim=1, descending=True, stable=True)
        chosen, _ = _invert(top.double() - log_total[short], top_p, uniforms[short])
        tokens[short] = order.gather(1, chosen[:, None])[:, 0]
    return tokens


def _invert(log_probabilities: Tensor, top_p: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the falling `log_probabilities` [B, N], and whether the nucleus ends within them, bool [B]."""
    cumulative = log_probabilities.exp().cumsum(dim=1)
    # The nucleus is the shortest beginning that holds at least top_p.
    size = (cumulative < top_p).sum(dim=1).clamp(max=cumulative.shape[1] - 1)
    total = cumulative.gather(1, size[:, None])
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)[:, 0]
    return torch.minimum(chosen, size), cumulative[:, -1] >= top_p


@dataclass
class _Writer:
    """The text of one sequence as it grows."""

    tokenizer: Any
    ends: set[int]
    stop: tuple[str, ...]
    limit: int
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    finish: str | None = None

    @classmethod
    def start(
        cls,
        engine: TransformersEngine,
        request: Request,
        prompt: Sequence[int],
        sampling: Sampling,
        stop: Sequence[str],
    ) -> _Writer:
        limit = min(sampling.max_new_tokens, engine.room(prompt))
        generator = torch.Generator().manual_seed(request.seed)
        uniforms = torch.rand(limit, generator=generator, dtype=torch.float64).tolist()
        return cls(engine.tokenizer, engine.end_tokens(), tuple(stop), limit, uniforms)

    def uniform(self) -> float:
        return self.uniforms[min(len(self.ids), self.limit - 1)]

    def write(self, token: int) -> None:
        """Add a token, unless the text has ended."""
        if self.finish is not None:
            return
        self.ids.append(token)
        if token in self.ends or self._stopped():
            self.finish = "stop"
        elif len(self.ids) == self.limit:
            self.finish = "length"

    def sample(self) -> Sample:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return Sample(cut_at_stop(text, self.stop), len(self.ids), self.finish or "length", self.ids)

    def _stopped(self) -> bool:
        if not self.stop:
            return False
        # A token may hold less than a character, so more tokens than characters have to be looked at.
        window = 4 * max(map(len, self.stop))
        tail = self.tokenizer.decode(self.ids[-window:], skip_special_tokens=True)
        return any(mark in tail for mark in self.stop)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the end of the first of its stop strings."""
    ends = [place + len(mark) for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text
