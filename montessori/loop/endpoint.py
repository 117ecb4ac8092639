"""Text from a server that speaks the completions protocol of OpenAI."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from montessori.errors import ModelError, ResourceError
from montessori.loop.decoding import cut_at_stop
from montessori.loop.engines import EngineSettings, Request, Sample, Sampling, leaves_room, prompt_ids
from montessori.models import checkpoint_name, load_tokenizer

_DEFAULT_LIMIT = 4096


class EndpointEngine:
    """Sends token ids to `base_url`/completions, `batch_size` requests at a time.

    The tokenizer is that of the checkpoint given to `load`; the server must serve the same model under the
    name `model`. Without `max_length` prompt and output share 4,096 tokens. `repetition_penalty` is no part
    of the protocol; it is sent where it is not 1, to servers that know it (vLLM, llama.cpp). Texts repeat as
    far as the server honours `seed`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.tokenizer: Any = None
        self._key = None
        if settings.api_key_env is not None:
            self._key = os.environ.get(settings.api_key_env)
            if not self._key:
                raise ModelError(f"engine.api_key_env: the environment variable {settings.api_key_env} is not set")
            if not (self._key.isascii() and self._key.isprintable()):
                raise ModelError(
                    f"engine.api_key_env: the environment variable {settings.api_key_env} holds a character that no "
                    "header may have, such as the end of a line: set it without"
                )

    def load(self, model: str | os.PathLike[str]) -> None:
        self.tokenizer = load_tokenizer(checkpoint_name(model))

    def fits(self, prompt: str) -> bool:
        return leaves_room(self.tokenizer, prompt, self.settings.max_length or _DEFAULT_LIMIT)

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        size = self.settings.batch_size
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = ()) -> list[Sample]:
        limit = self.settings.max_length or _DEFAULT_LIMIT
        bodies = [
            self._body(request, ids, sampling, stop, limit)
            for request, ids in zip(requests, prompt_ids(self.tokenizer, requests, limit), strict=True)
        ]
        with ThreadPoolExecutor(self.settings.batch_size) as pool:
            answers = list(pool.map(self._post, bodies))
        return [self._sample(answer, stop) for answer in answers]

    def release(self) -> None:
        """The memory is the server's."""

    def _body(
        self, request: Request, ids: list[int], sampling: Sampling, stop: Sequence[str], limit: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "prompt": ids,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "max_tokens": min(sampling.max_new_tokens, limit - len(ids)),
            "seed": request.seed,
        }
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        if stop:
            body["stop"] = list(stop)
        return body

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        url = f"{str(self.settings.base_url).rstrip('/')}/completions"
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        call = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(self.settings.retries + 1):
            try:
                with urllib.request.urlopen(call, timeout=self.settings.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                # The server will say the same again, unless it was busy or broken.
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ResourceError(f"{url}: {reason}: {_said(error)}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            if attempt < self.settings.retries:
                time.sleep(min(0.5 * 2**attempt, 30))
        raise ResourceError(
            f"{url}: no answer after {self.settings.retries + 1} tries ({reason}); is the server up? "
            "What was written is kept, the same command goes on"
        )

    def _sample(self, answer: dict[str, Any], stop: Sequence[str]) -> Sample:
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text, finish, counted = choice["text"], choice.get("finish_reason"), usage.get("completion_tokens")
            # Half a character cannot be written to a file, or read by a tokenizer.
            text.encode()
            if not isinstance(counted, int | None):
                raise TypeError
        except (AttributeError, KeyError, IndexError, TypeError, UnicodeEncodeError) as error:
            raise ResourceError(
                f"{self.settings.base_url}: expected choices with a text and a number of tokens, got "
                f"{json.dumps(answer)[:200]}"
            ) from error
        # Servers leave the stop string out. Those that tell an end of text from a stop string do so in
        # stop_reason, which the others do not have.
        if finish == "stop" and stop and not any(mark in text for mark in stop):
            reason = choice.get("stop_reason", stop[0])
            text += reason if reason in stop else ""
        tokens = counted or len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Sample(cut_at_stop(text, stop), tokens, "length" if finish == "length" else "stop")


def _said(error: urllib.error.HTTPError) -> str:
    return " ".join(error.read(500).decode(errors="replace").split())
