"""What a generation engine is asked and what it answers; opening one by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import urllib.parse
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from typing_extensions import Self

from montessori.errors import ArgumentError, DataError
from montessori.journal import ScoreJournal
from montessori.loop.section import Section

# Settings of an engine that say where and how long it works, not what it writes.
UNSEEN = frozenset({"device", "base_url", "api_key_env", "timeout", "retries", "gpu_memory_utilization"})


# Tokens that prompt and output of an endpoint share, whose model's own limit nothing here tells.
ENDPOINT_LIMIT = 4096


class Sampling(Section):
    """How text is drawn; `temperature` 0 takes the most likely token.

    `presence_penalty` is subtracted from the logits of tokens in the output so far; `repetition_penalty`
    divides positive and multiplies negative logits of tokens in the prompt or the output.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    presence_penalty: float = Field(default=1.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=1024, ge=1)


class EngineSettings(Section):
    """Which engine generates, and how much at once.

    `batch_size`: sequences decoded together (`transformers`), most sequences in flight (`vllm`), or
    simultaneous requests (`endpoint`). `dtype`: of the weights; a teacher tuned with a small learning rate
    differs from its base by less than bfloat16 can hold, hence float32. `device`: auto, cpu or cuda. `max_length`:
    tokens of prompt and output together, by default the model's own limit, and 4,096 of an endpoint's.

    Of vllm alone: `tensor_parallel_size` devices share the weights, and `gpu_memory_utilization` of each is taken. Of
    an endpoint alone: `base_url` (http://host:port/v1) and `model`, its name there, of an OpenAI-compatible server; the
    key, if it needs one, is read from the environment variable `api_key_env`; `timeout` seconds without a byte of its
    answer are a failed try, of which there may be `retries` more; `extra_body` has more fields for every request, such
    as `top_k` and `min_p` of servers that know them.
    """

    name: Literal["transformers", "vllm", "endpoint"] = "transformers"
    batch_size: int = Field(default=32, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    max_length: int | None = Field(default=None, ge=2)
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    timeout: float = Field(default=600.0, gt=0)
    retries: int = Field(default=5, ge=0)
    extra_body: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "endpoint" and (self.base_url is None or self.model is None):
            raise ValueError("engine.name=endpoint: expected engine.base_url and engine.model as well")
        if self.base_url is not None:
            _check_url(self.base_url)
        return self


@dataclass(frozen=True)
class Request:
    """One text to be written: `prompt` exactly as the model reads it, randomness from `seed` alone.

    Special tokens stand in `prompt` as text; none are added.
    """

    id: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sample:
    """`text` up to and with its stop string; `finish` is "stop", or "length" where the limit or a server cut it.

    `ids`: what the model wrote, with the token that ended it; None where the engine does not tell.
    """

    text: str
    num_tokens: int
    finish: str
    ids: list[int] | None = None


class Engine(Protocol):
    """Writes text with a model that can be put aside while another part of the program needs the memory."""

    tokenizer: Any

    def load(self, model: str | os.PathLike[str]) -> None:
        """Generate with the checkpoint `model` from now on, whatever was loaded before."""

    def fits(self, prompt: str) -> bool:
        """Whether `prompt` leaves room for output in the context of the model."""

    def write(
        self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = (), done: Container[str] = ()
    ) -> Iterator[list[tuple[Request, Sample]]]:
        """One sample of every request whose id is not `done`, as they come: a list is kept on disk before the next."""

    def release(self) -> None:
        """Give the memory of the model back; `load` brings the engine to life again."""


class BatchedEngine:
    """Engines whose texts depend, if in their last bits alone, on what shares a batch: where one request of a batch is
    not done, all are written again."""

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The calls of `generate` that `requests` take."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = ()) -> list[Sample]:
        """One sample per request, in order."""
        raise NotImplementedError

    def write(
        self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = (), done: Container[str] = ()
    ) -> Iterator[list[tuple[Request, Sample]]]:
        for batch in self.batches(requests) if requests else []:
            if not all(request.id in done for request in batch):
                yield list(zip(batch, self.generate(batch, sampling, stop), strict=True))


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        parts = urllib.parse.urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or any(map(str.isspace, url)):
        raise ValueError(f"engine.base_url={url!r}: expected http:// or https:// and a host")
    if parts.username is not None:
        raise ValueError("engine.base_url: expected no name or password in it: give a key by engine.api_key_env")
    if parts.query or parts.fragment:
        raise ValueError(f"engine.base_url={url!r}: expected an address that /completions can follow, without ? and #")


def check_room(settings: EngineSettings, sampling: Sampling, key: str) -> None:
    """Raise ArgumentError where an endpoint's default limit would cut answers short of max_new_tokens."""
    if settings.name == "endpoint" and settings.max_length is None and sampling.max_new_tokens >= ENDPOINT_LIMIT:
        raise ArgumentError(
            f"{key}.max_length: prompt and output share {ENDPOINT_LIMIT} tokens of an endpoint by default, and "
            f"max_new_tokens is {sampling.max_new_tokens}: set it to what the server takes"
        )


def open_engine(settings: EngineSettings) -> Engine:
    """The engine of that name, without a model. Raises ModelError when what it needs is not installed."""
    if settings.name == "vllm":
        from montessori.loop.vllm_engine import VllmEngine

        return VllmEngine(settings)
    if settings.name == "endpoint":
        from montessori.loop.endpoint import EndpointEngine

        return EndpointEngine(settings)
    from montessori.loop.decoding import TransformersEngine

    return TransformersEngine(settings)


@dataclass
class SampleMemory:
    """Samples on disk by the id of their request."""

    journal: ScoreJournal
    samples: dict[str, Sample] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for record in self.journal.records:
            self._take(record)

    def complete(
        self, engine: Engine, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = ()
    ) -> list[Sample]:
        """One sample per request; those not on disk are written by the engine and put there."""
        for written in engine.write(requests, sampling, stop, self.samples):
            rows = [{"id": request.id, **dataclasses.asdict(sample)} for request, sample in written]
            self.journal.append({"samples": rows})
            self._take({"samples": rows})
        return [self.samples[request.id] for request in requests]

    def _take(self, record: dict[str, Any]) -> None:
        for row in record["samples"]:
            self.samples[row["id"]] = Sample(**{name: value for name, value in row.items() if name != "id"})


def tokens_written(files: Iterable[Path]) -> int:
    """Tokens of all samples in journals of finished `SampleMemory`s."""
    records = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return sum(row["num_tokens"] for record in records for row in record.get("samples", ()))


def derive_seed(*parts: object) -> int:
    """63 bits that depend on `parts` alone, for the randomness of one request or one draw."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def prompt_ids(tokenizer: Any, requests: Sequence[Request], limit: int) -> list[list[int]]:
    """Token ids of every prompt, without special tokens but those that stand in the text.

    Raises DataError for a prompt that leaves no room for output within `limit` tokens.
    """
    encoded = tokenizer([request.prompt for request in requests], add_special_tokens=False, verbose=False)["input_ids"]
    for request, ids in zip(requests, encoded, strict=True):
        if not 0 < len(ids) < limit:
            raise DataError(
                f"prompt {request.id}: expected 1 to {limit - 1} tokens, got {len(ids)}; prompt and output share "
                f"{limit}, the lower of the model's own limit and its engine.max_length: shorten what the prompt holds "
                "(of a teacher's, use fewer or shorter examples)"
            )
    return encoded


def leaves_room(tokenizer: Any, prompt: str, limit: int) -> bool:
    """Whether `prompt_ids` would take `prompt`."""
    return 0 < len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]) < limit


def context_length(config: Any, max_length: int | None) -> int:
    """Tokens that prompt and output may have together."""
    own = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (max_length, own) if isinstance(limit, int)]
    return min(limits) if limits else 2048
