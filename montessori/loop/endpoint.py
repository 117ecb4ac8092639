"""Text from a server that speaks the completions protocol of OpenAI."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from montessori.errors import ModelError, ResourceError
from montessori.loop.decoding import cut_at_stop
from montessori.loop.engines import (
    ENDPOINT_LIMIT,
    EngineSettings,
    Request,
    Sample,
    Sampling,
    check_room,
    leaves_room,
    prompt_ids,
)
from montessori.models import checkpoint_name, load_tokenizer

# Seconds before a failed try is repeated, where the server names none.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30
# What the server was too busy or too broken for; it says the rest again.
_REPEATED = (408, 409, 429)
# Words for an answer that the server keeps to itself, as codes of an error.
_FILTERED = ("content_filter", "content_policy_violation")
# Words for an end that the model wrote; at any other the server cut it short.
_ENDED = (None, "stop", "eos", "eos_token", "stop_sequence")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key to another host and leave the request behind."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _RefusedError(Exception):
    """A failed try that may be repeated, after `wait` seconds if the server said so."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


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
        self._url = f"{str(settings.base_url).rstrip('/')}/completions"
        self._opener = urllib.request.build_opener(_Stay)
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
        return leaves_room(self.tokenizer, prompt, self._limit())

    def write(
        self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = (), done: Container[str] = ()
    ) -> Iterator[list[tuple[Request, Sample]]]:
        """Each sample as it arrives: none is paid for twice."""
        check_room(self.settings, sampling, "engine")
        left = [request for request in requests if request.id not in done]
        bodies = [
            self._body(request, ids, sampling, stop)
            for request, ids in zip(left, prompt_ids(self.tokenizer, left, self._limit()), strict=True)
        ]
        for place, answer in self._answers(bodies):
            yield [(left[place], self._sample(answer, stop))]

    def release(self) -> None:
        """The memory is the server's."""

    def _limit(self) -> int:
        return self.settings.max_length or ENDPOINT_LIMIT

    def _body(self, request: Request, ids: list[int], sampling: Sampling, stop: Sequence[str]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "prompt": ids,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "max_tokens": min(sampling.max_new_tokens, self._limit() - len(ids)),
            "seed": request.seed,
        }
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        if stop:
            body["stop"] = list(stop)
        return {**body, **self.settings.extra_body}

    def _answers(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Place and answer of every body, as they come. What has come before one fails is given out first; threads that
        still wait for the server then hold up neither the error nor the end of the program."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        found: queue.SimpleQueue[tuple[int, dict[str, Any] | Exception]] = queue.SimpleQueue()
        over = threading.Event()
        for place in range(len(bodies)):
            todo.put(place)

        def work() -> None:
            with suppress(queue.Empty):
                while not over.is_set():
                    place = todo.get_nowait()
                    try:
                        found.put((place, self._post(bodies[place], over)))
                    except Exception as error:
                        over.set()
                        found.put((place, error))

        try:
            for _ in range(min(self.settings.batch_size, len(bodies))):
                threading.Thread(target=work, daemon=True).start()
            failure = None
            for _ in bodies:
                try:
                    place, answer = found.get(block=failure is None)
                except queue.Empty:
                    break
                if not isinstance(answer, Exception):
                    yield place, answer
                else:
                    failure = failure or answer
            if failure is not None:
                raise failure
        finally:
            over.set()

    def _post(self, body: Mapping[str, Any], over: threading.Event) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        call = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(self.settings.retries + 1):
            try:
                return self._try(call)
            except _RefusedError as refused:
                reason = str(refused)
                wait = max(refused.wait, min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT))
            if attempt == self.settings.retries or _over_within(over, wait):
                break
        raise ResourceError(
            f"{self._url}: no answer after {attempt + 1} tries ({reason}); is the server up? "
            "What was written is kept, the same command goes on"
        )

    def _try(self, call: urllib.request.Request) -> dict[str, Any]:
        try:
            with self._opener.open(call, timeout=self.settings.timeout) as answer:
                said = _Said.of(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            content = b""
            # A status says enough where the words to it do not come.
            with suppress(OSError, http.client.HTTPException):
                content = error.read()
            said = _Said.of(error.code, error.headers, content, str(error.reason))
        except (OSError, http.client.HTTPException) as error:
            raise _RefusedError(str(error) or type(error).__name__) from error
        return self._content(said)

    def _content(self, said: _Said) -> dict[str, Any]:
        """The answer; _RefusedError where the same request may be answered yet, ResourceError where it will not."""
        if said.filtered:
            return {"choices": [{"text": "", "finish_reason": "content_filter"}], "usage": {"completion_tokens": 0}}
        words = said.words.replace(self._key, "***") if self._key else said.words
        if said.status in _REPEATED or said.status >= 500:
            raise _RefusedError(words, said.wait)
        if 300 <= said.status < 400:
            raise ResourceError(f"{self._url}: the server redirects to {said.location}: set engine.base_url to that")
        if said.status >= 400:
            raise ResourceError(f"{self._url}: {words}")
        if said.content is None:
            raise _RefusedError(f"expected JSON, got {words}")
        return said.content

    def _sample(self, answer: dict[str, Any], stop: Sequence[str]) -> Sample:
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text, finish, counted = choice["text"], choice.get("finish_reason"), usage.get("completion_tokens")
            if text is None and finish in _FILTERED:
                text = ""
            # Half a character cannot be written to a file, or read by a tokenizer.
            text.encode()
            if not isinstance(counted, int | None):
                raise TypeError
        except (AttributeError, KeyError, IndexError, TypeError, UnicodeEncodeError) as error:
            raise ResourceError(
                f"{self.settings.base_url}: expected choices with a text and a number of tokens, got "
                f"{json.dumps(answer)[:200]}"
            ) from error
        # Servers leave the stop string out. vLLM and SGLang tell it from an end of text; of others it is taken to be
        # what ended theirs.
        if finish == "stop" and stop and not any(mark in text for mark in stop):
            reason = choice.get("stop_reason", choice.get("matched_stop", stop[0]))
            text += reason if reason in stop else ""
        tokens = counted or len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Sample(cut_at_stop(text, stop), tokens, "stop" if finish in _ENDED else "length")


@dataclass(frozen=True)
class _Said:
    """What a server answered: `content` if that is JSON; `words` to it in one line; `wait` seconds before it wants to
    be asked again; `filtered` where it will not answer this request but others."""

    status: int
    content: Any
    words: str
    wait: float
    location: str
    filtered: bool

    @classmethod
    def of(cls, status: int, headers: Any, body: bytes, reason: str = "") -> _Said:
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        error = content.get("error") if isinstance(content, dict) else None
        error = error if isinstance(error, dict) else {}
        code = error.get("code")
        if status == 200 and isinstance(code, int):
            # Some put it there alone, for what another server said to them.
            status = code
        if status == 200 and _broke_off(content):
            status = 500
        said = " ".join(str(error.get("message") or body[:500].decode(errors="replace")).split())[:500]
        kind = headers.get("Content-Type") or "no content type"
        words = f"{status} {reason}: {said}" if reason or content is not None else f"{kind}: {said[:100]}"
        filtered = status != 200 and (code in _FILTERED or error.get("type") in _FILTERED)
        return cls(status, content, words, _seconds(headers), headers.get("Location") or "nowhere", filtered)


def _over_within(over: threading.Event, seconds: float) -> bool:
    return over.wait(seconds)


def _broke_off(content: Any) -> bool:
    """Whether the server says that it failed while it wrote."""
    choices = content.get("choices") if isinstance(content, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    return isinstance(choice, dict) and choice.get("finish_reason") == "error"


def _seconds(headers: Any) -> float:
    """What Retry-After asks for, as a number or as a date, and no more than an hour."""
    asked = headers.get("Retry-After")
    if not asked:
        return 0.0
    try:
        wait = float(asked)
    except ValueError:
        try:
            date, now = parsedate_to_datetime(asked), parsedate_to_datetime(headers.get("Date") or "")
            wait = (date - now).total_seconds()
        except (TypeError, ValueError):
            return 0.0
    return min(max(wait, 0.0), 3600.0)
