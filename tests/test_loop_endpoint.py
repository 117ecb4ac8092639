"""A server that speaks OpenAI's protocol: what it is sent, and all that servers answer."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from engine_support import PROMPTS, opened, requests, write_all
from support import WORDS, make_tokenizer

from montessori.errors import ArgumentError, ModelError, ResourceError
from montessori.journal import ScoreJournal
from montessori.loop import endpoint as module
from montessori.loop.engines import EngineSettings, SampleMemory, Sampling, derive_seed
from montessori.loop.judge import Judge, JudgeSettings


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tokenizer: the weights are the server's."""
    path = tmp_path_factory.mktemp("teacher")
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def waits(monkeypatch):
    """Seconds that tries wait for each other, which nobody here has."""
    asked: list[float] = []
    monkeypatch.setattr(module, "_over_within", lambda over, seconds: asked.append(seconds) or over.is_set())
    return asked


class Server:
    """A completions server. `reply` makes (status, headers, content) of a request, `answer` the content alone; without
    them words are drawn from the seed, after `failures` refusals."""

    def __init__(self, failures=0, status=503, answer=None, reply=None):
        self.seen: list[dict] = []
        self.headers: list[str | None] = []
        outer, left = self, [failures]

        def said(asked):
            if left[0]:
                left[0] -= 1
                return status, {}, b"model not\nknown"
            outer.seen.append(asked)
            return reply(asked) if reply else (200, {}, answer or outer.answer(asked))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.headers.append(self.headers.get("Authorization"))
                code, headers, content = said(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def do_GET(self):
                outer.headers.append(self.headers.get("Authorization"))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, asked):
        words = [WORDS[(asked["seed"] + place) % len(WORDS)] for place in range(min(4, asked["max_tokens"]))]
        reason = (asked.get("stop") or [None])[0] if asked["seed"] % 2 else None
        choice = {"text": " ".join(words), "finish_reason": "stop", "stop_reason": reason}
        return {"choices": [choice], "usage": {"completion_tokens": len(words)}}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def endpoint(teacher, server, **settings):
    return opened(teacher, **{"name": "endpoint", "base_url": server.url, "model": "m", "batch_size": 3, **settings})


def test_the_endpoint_is_sent_token_ids_and_settings_and_answers_in_order(teacher, monkeypatch):
    monkeypatch.setenv("LOOP_TEST_KEY", "secret")
    with Server() as server:
        engine = endpoint(teacher, server, api_key_env="LOOP_TEST_KEY")
        asked = requests(PROMPTS, siblings=2)
        sampling = Sampling(max_new_tokens=9, repetition_penalty=1.5)
        samples = write_all(engine, asked, sampling, stop=("</x>",))
    assert set(server.headers) == {"Bearer secret"}
    body = next(body for body in server.seen if body["seed"] == asked[4].seed)
    assert body["prompt"] == engine.tokenizer(PROMPTS[2], add_special_tokens=False)["input_ids"]
    sent = [
        body[key] for key in ("model", "temperature", "top_p", "presence_penalty", "repetition_penalty", "max_tokens")
    ]
    assert sent == ["m", 1.0, 0.9, 1.0, 1.5, 9] and body["stop"] == ["</x>"]
    for request, sample in zip(asked, samples, strict=True):
        assert sample.text.startswith(WORDS[request.seed % len(WORDS)])
        # The stop string is put back where the server says that it ended the text.
        assert sample.text.endswith("</x>") == bool(request.seed % 2)
        assert sample.num_tokens == 4 and sample.finish == "stop"


def test_the_endpoint_tries_again_while_the_server_is_busy(teacher):
    with Server(failures=1, status=429) as server:
        samples = write_all(endpoint(teacher, server), requests(["say"]), Sampling(max_new_tokens=2))
    assert samples[0].num_tokens == 2


def test_endpoint_failures_are_one_line(teacher):
    with Server(failures=9, status=404) as server, pytest.raises(ResourceError, match="404 Not Found: model not known"):
        write_all(endpoint(teacher, server), requests(["say"]), Sampling())
    with Server(failures=9) as server, pytest.raises(ResourceError, match="no answer after 1 tries"):
        write_all(endpoint(teacher, server, retries=0), requests(["say"]), Sampling())
    with Server(answer={"error": "x"}) as server, pytest.raises(ResourceError, match="expected choices with a text"):
        write_all(endpoint(teacher, server), requests(["say"]), Sampling())
    with pytest.raises(ResourceError, match="no answer after 1 tries"):
        write_all(endpoint(teacher, server, retries=0), requests(["say"]), Sampling())
    with pytest.raises(ModelError, match="NO_SUCH_KEY is not set"):
        endpoint(teacher, server, api_key_env="NO_SUCH_KEY")
    with pytest.raises(ArgumentError, match=r"engine\.base_url"):
        EngineSettings.read({"name": "endpoint"}, "x")
    for url in ("", "foo", "localhost:8000/v1", "http://"):
        with pytest.raises(ArgumentError, match="expected http:// or https:// and a host"):
            EngineSettings.read({"name": "endpoint", "model": "m", "base_url": url}, "x")


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": 5}]},
        {"choices": [{"text": "half \ud83d of it"}]},
        {"choices": [{"text": "say"}], "usage": [1]},
        {"choices": [{"text": "say"}], "usage": {"completion_tokens": "3"}},
        {"choices": []},
        ["say"],
    ],
)
def test_an_answer_of_another_form_is_one_line(answer, teacher):
    with Server(answer=answer) as server, pytest.raises(ResourceError, match="expected choices with a text and a num"):
        write_all(endpoint(teacher, server), requests(["say"]), Sampling(), stop=("</x>",))


def test_a_key_that_no_header_may_hold_is_refused_and_not_shown(teacher, monkeypatch):
    for key in ("sk-secret\n", "sk-sécret"):
        monkeypatch.setenv("LOOP_TEST_KEY", key)
        with pytest.raises(ModelError, match="LOOP_TEST_KEY holds a character that no header may have") as caught:
            endpoint(teacher, Server(), api_key_env="LOOP_TEST_KEY")
        assert "sk-" not in str(caught.value)


def says(text, **choice):
    return {"choices": [{"text": text, **choice}], "usage": {"completion_tokens": 2}}


@pytest.mark.parametrize(
    ("choice", "stop", "text", "finish"),
    [
        ({"finish_reason": "stop"}, (), "say", "stop"),
        ({"finish_reason": "length"}, (), "say", "length"),
        # Cut by the server: half of a sentence is no answer.
        ({"finish_reason": "content_filter"}, (), "say", "length"),
        ({"finish_reason": "abort"}, (), "say", "length"),
        ({"finish_reason": "repetition"}, (), "say", "length"),
        # Which of stop string and end of text it was: as vLLM, SGLang and servers without a word for it say it.
        ({"finish_reason": "stop", "stop_reason": "</x>"}, ("</x>",), "say</x>", "stop"),
        ({"finish_reason": "stop", "stop_reason": None}, ("</x>",), "say", "stop"),
        ({"finish_reason": "stop", "matched_stop": "</x>"}, ("</x>",), "say</x>", "stop"),
        ({"finish_reason": "stop", "matched_stop": 151645}, ("</x>",), "say", "stop"),
        ({"finish_reason": "stop"}, ("</x>",), "say</x>", "stop"),
    ],
)
def test_how_a_text_ended_is_what_the_server_says(choice, stop, text, finish, teacher):
    with Server(answer=says("say", **choice)) as server:
        sample = write_all(endpoint(teacher, server), requests(["say"]), Sampling(), stop)[0]
    assert (sample.text, sample.finish, sample.num_tokens) == (text, finish, 2)


def filtered(asked):
    if asked["seed"] == derive_seed(0, 1, 0):
        return 400, {}, {"error": {"code": "content_filter", "message": "no"}}
    return 200, {}, says("say", finish_reason="stop")


@pytest.mark.parametrize(
    "reply",
    [filtered, lambda asked: (200, {}, says(None, finish_reason="content_filter")) if len(asked["prompt"]) == 1 else
     (200, {}, says("say", finish_reason="stop"))],
    ids=["by status", "in the choice"],
)  # fmt: skip
def test_a_request_that_the_server_filters_is_an_empty_text_and_the_others_go_on(reply, teacher):
    with Server(reply=reply) as server:
        samples = write_all(endpoint(teacher, server), requests(PROMPTS), Sampling())
    assert [sample.text for sample in samples] == ["say", "", "say", "say"]
    assert samples[1].finish == "length"


def test_what_was_answered_before_an_error_is_kept_and_not_asked_again(teacher, tmp_path):
    """Three of four are answered, then the last one is refused for good; the same command asks for that one alone."""
    bad, last = [True], requests(PROMPTS)[-1].seed

    def reply(asked):
        if asked["seed"] == last and bad[0]:
            while len(server.seen) < 4:
                time.sleep(0.01)
            time.sleep(0.1)
            return 401, {}, b"who are you"
        return 200, {}, server.answer(asked)

    def run():
        journal = ScoreJournal(tmp_path / "samples.jsonl")
        with journal.opened({}):
            return SampleMemory(journal).complete(engine, requests(PROMPTS), Sampling())

    with Server(reply=reply) as server:
        engine = endpoint(teacher, server)
        with pytest.raises(ResourceError, match="401 Unauthorized: who are you"):
            run()
        asked, bad[0] = len(server.seen), False
        assert len(run()) == 4
    assert asked == 4 and [body["seed"] for body in server.seen[asked:]] == [last]


def test_one_slow_answer_does_not_hold_up_the_others(teacher):
    """A slow request waits until all others are answered, of which there are more than go at a time."""
    slow, told = requests(PROMPTS, siblings=3)[0].seed, threading.Event()

    def reply(asked):
        if asked["seed"] == slow:
            assert told.wait(30)
        elif len(server.seen) == 12:
            told.set()
        return 200, {}, server.answer(asked)

    with Server(reply=reply) as server:
        parts = list(endpoint(teacher, server).write(requests(PROMPTS, siblings=3), Sampling()))
    assert len(parts) == 12


def test_an_error_does_not_wait_for_answers_under_way(teacher):
    never = threading.Event()

    def reply(asked):
        if asked["seed"] == requests(PROMPTS)[0].seed:
            return 403, {}, b"no"
        never.wait(60)
        return 200, {}, server.answer(asked)

    with Server(reply=reply) as server:
        begun = time.monotonic()
        with pytest.raises(ResourceError, match="403 Forbidden: no"):
            write_all(endpoint(teacher, server), requests(PROMPTS), Sampling())
        assert time.monotonic() - begun < 30
        never.set()


def test_a_busy_server_says_when_to_come_again(teacher, waits):
    later = {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}
    answers = iter([(429, {"Retry-After": "3"}, b""), (503, later, b""), (503, {"Retry-After": "soon"}, b"")])
    with Server(reply=lambda asked: next(answers, (200, {}, says("say", finish_reason="stop")))) as server:
        sample = write_all(endpoint(teacher, server), requests(["say"]), Sampling())[0]
    assert sample.text == "say" and waits == [3, 3600, 2]


@pytest.mark.parametrize(
    ("status", "content", "match"),
    [
        (429, {"error": {"message": "Above your quota", "code": "insufficient_quota"}}, "429 .*Above your quota"),
        (500, b"EngineDeadError", "500 Internal Server Error: EngineDeadError"),
        # What another server said to a router, and a failure while it wrote.
        (200, {"error": {"code": 502, "message": "upstream"}}, "502 : upstream"),
        (200, says("half", finish_reason="error"), "500"),
        (200, b"<html>a page of something else</html>", "expected JSON, got no content type: <html>a page"),
        (200, b"\x1f\x8b\x08\x00", "expected JSON, got"),
    ],
)  # fmt: skip
def test_a_try_that_failed_is_repeated_and_said_in_the_words_of_the_server(status, content, match, teacher, waits):
    given = pytest.raises(ResourceError, match=f"no answer after 3 tries .*{match}")
    with Server(reply=lambda asked: (status, {}, content)) as server, given as caught:
        write_all(endpoint(teacher, server, retries=2), requests(["say"]), Sampling())
    assert len(server.seen) == 3 and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_with_the_key(status, teacher, monkeypatch):
    monkeypatch.setenv("LOOP_TEST_KEY", "sk-secret")
    with Server() as other:
        to = f"{other.url}/completions"
        refused = pytest.raises(ResourceError, match=f"redirects to {to}: set engine.base_url to that")
        with Server(reply=lambda asked: (status, {"Location": to}, b"")) as server, refused:
            write_all(endpoint(teacher, server, api_key_env="LOOP_TEST_KEY"), requests(["say"]), Sampling())
    assert not other.headers


def test_a_key_that_the_server_says_again_is_not_shown(teacher, monkeypatch):
    monkeypatch.setenv("LOOP_TEST_KEY", "sk-secret")
    reply = (401, {}, b"Invalid key: Bearer sk-secret")
    with Server(reply=lambda asked: reply) as server, pytest.raises(ResourceError, match=r"Bearer \*\*\*"):
        write_all(endpoint(teacher, server, api_key_env="LOOP_TEST_KEY"), requests(["say"]), Sampling())


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://me:word@host/v1", "no name or password in it"),
        ("http://host/v1?api-version=2024-10-21", "without"),
        ("http://host/v1#x", "without"),
    ],
)
def test_addresses_that_completions_cannot_follow_are_refused(url, match):
    with pytest.raises(ArgumentError, match=match) as caught:
        EngineSettings.read({"name": "endpoint", "model": "m", "base_url": url}, "x")
    assert "word@" not in str(caught.value)


def test_more_fields_are_sent_as_given(teacher):
    with Server() as server:
        engine = endpoint(teacher, server, extra_body={"top_k": -1, "repetition_penalty": 1.0})
        write_all(engine, requests(["say"]), Sampling())
    assert server.seen[0]["top_k"] == -1 and server.seen[0]["repetition_penalty"] == 1.0


def test_answers_longer_than_the_default_limit_are_refused_before_one_is_paid(teacher):
    with Server() as server:
        with pytest.raises(ArgumentError, match=r"engine\.max_length: prompt and output share 4096"):
            write_all(endpoint(teacher, server), requests(["say"]), Sampling(max_new_tokens=16384))
        assert not server.seen
        write_all(endpoint(teacher, server, max_length=20000), requests(["say"]), Sampling(max_new_tokens=16384))
    assert server.seen[0]["max_tokens"] == 16384


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("<think>\nThe grade: 3 would be harsh.\n</think>\n\n9", 9.0),
        ("Okay. Score 2 for style?\nNo.\n</think>\n\n8", 8.0),
        ("<think>\nThe grade: 3", None),
    ],
)
def test_what_a_judge_thinks_is_no_verdict(reply, grade, teacher, tmp_path):
    other = says("7", finish_reason="stop")
    first = derive_seed(0, "grade", 0)
    with Server(reply=lambda asked: (200, {}, says(reply) if asked["seed"] == first else other)) as server:
        judge = Judge(JudgeSettings(model="m"), endpoint(teacher, server), tmp_path)
        grades = judge.grade([{"instruction": text, "response": text} for text in ("say", "name")])
    assert grades.tolist()[1] == 7 and (grades[0] == grade if grade else judge.unread == 1)
