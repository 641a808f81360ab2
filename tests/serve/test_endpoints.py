"""The server as plain HTTP sees it: refusals, bounds, keys, clients that go away, metrics, curl."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")

from helpers.serving import FIXED, LINES, GatedModel, client, demo_pair, plain, serving
from helpers.tiny_models import make_pair

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = "a-key-of-some-length"
GATED = plain(FIXED)
CALLABLE = {"type": "function", "function": {"name": "f"}}
CALLED = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]}


@pytest.fixture(scope="module")
def http() -> Iterator[Any]:
    with serving(demo_pair(target_name="/srv/models/demo")) as running, client(running) as http:
        yield http


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beam_width": 4}, "beam_width"),
        ({"best_of": 2}, "best_of"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("1e999")}, None),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**80}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"verify": "never"}, "verify"),
        ({"draft": "oracle"}, "draft"),
        ({"draft": "assistant"}, "draft"),  # none was loaded
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prediction": {"type": "content", "content": "a"}, "draft": "none"}, "prediction"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "odd": 1}}, "response_format.odd"),
        ({"prediction": {"type": "image", "content": "x"}}, "prediction.type"),
        ({"logit_bias": {"3": 200}}, "logit_bias.3"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [3]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": [CALLABLE]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": "no"}}, "chat_template_kwargs"),
        ({"messages": [CALLED, *LINES]}, "messages"),  # the demo's template leaves calls out
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}, *LINES]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"model": "\ud800"}, "model"),
        ({"\ud800": 1}, "\\ud800"),
        ({"guided_regex": "\ud800"}, "guided_regex"),
        ({"guided_choice": ["\ud800"]}, "guided_choice"),
        ({"temperature": 10**400}, "temperature"),
        ({"logit_bias": {"3": 10**400}}, "logit_bias.3"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"tools": [CALLABLE], "tool_choice": {"function": "f"}}, "tools"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, "messages"),
        ({"messages": [*LINES, {"role": "assistant", "content": "I"}]}, "messages"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(http: Any, change: dict[str, Any], named: str | None) -> None:
    body = json.dumps({"messages": LINES, "max_tokens": 2, **change})
    if change.get("temperature") == float("inf"):
        body = body.replace("Infinity", "1e999")
    reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    assert error["param"] == (named or "temperature")
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_defect_is_told_in_the_shape_that_clients_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("quasar_core.serve.app.read_chat", fail)
    with serving(demo_pair()) as running, client(running) as http:
        reply = http.post(CHAT, json={"messages": LINES})
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "Internal error: ZeroDivisionError."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_hostile_regular_expression_is_refused_and_disturbs_nobody(http: Any, stream: bool) -> None:
    expression, body = "(a{1000}){1000}", {"messages": LINES, "max_tokens": 64, "stream": stream}
    reply = http.post(CHAT, json={**body, "guided_regex": expression})
    text = reply.text if not stream else reply.text.rstrip().rpartition("data: ")[2]
    error = json.loads(text)["error"]
    assert reply.status_code == (200 if stream else 400)  # a stream has begun by then
    assert error["type"] == "invalid_request_error"
    assert "too complex" in error["message"]
    assert http.post(CHAT, json={"messages": LINES, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("change", [{"min_p": 1}, {"top_p": 0}, {"min_p": 1, "top_p": 0, "top_k": -1}], ids=str)
def test_the_ends_of_bounds_are_taken_as_the_library_takes_them(http: Any, change: dict[str, Any]) -> None:
    greedy, at_its_end = ({"messages": LINES, "max_tokens": 8, "temperature": t, **change} for t in (0, 1.5))
    texts = [http.post(CHAT, json=body).json()["choices"][0]["message"]["content"] for body in (greedy, at_its_end)]
    assert texts[0] == texts[1]


def test_labels_and_fields_that_ask_for_nothing_are_taken(http: Any) -> None:
    idle = {"user": "u", "metadata": {"a": "b"}, "store": False, "suffix": None, "best_of": 1, "tool_choice": "none"}
    assert http.post(CHAT, json={"messages": LINES, "max_tokens": 2, "model": "default", **idle}).status_code == 200


def test_a_folder_is_no_name_and_stays_private(http: Any) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == "demo"
    for path in ("/../../etc/passwd", "/%2e%2e/app.py", "/v1/models//srv/models/demo", "/page"):
        assert http.get(path).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 10**5, 400), (b'{"a":' * 99 + b"1" + b"}" * 99, 400)],
    ids=range(5),
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(http: Any, body: bytes, status: int) -> None:
    reply = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_forms_of_other_sites_and_other_names_of_this_machine_are_refused(http: Any) -> None:
    """What a page in a browser can send without being allowed to, and the trick of a name that leads here."""
    body = json.dumps({"messages": LINES, "max_tokens": 2})
    assert http.post(CHAT, content=body, headers={"content-type": "text/plain"}).status_code == 415
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"host": "localhost:1234"}).status_code == 200
    reply = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in reply.headers
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    reply = http.options(CHAT, headers=asked)
    assert reply.status_code == 403
    assert "--cors https://evil.example would let them" in reply.json()["error"]["message"]


def test_the_key_the_named_site_and_the_bounds() -> None:
    options: Any = {"api_key": KEY, "origins": ("https://example.org",), "most_bytes": 2048, "most_prompt": 30}
    with serving(demo_pair(), **options) as running, client(running) as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {KEY}x"}):
            for path in ("/v1/models", "/metrics"):
                assert http.get(path, headers=headers).status_code == 401
            assert http.post(CHAT, json={}, headers=headers).status_code == 401
        http.headers["authorization"] = f"Bearer {KEY}"
        reply = http.get("/v1/models", headers={"origin": "https://example.org", "host": "any.example"})
        assert reply.headers["access-control-allow-origin"] == "https://example.org"
        asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
        assert http.options(CHAT, headers=asked).status_code == 200
        assert http.post(CHAT, json={"messages": LINES, "user": "u" * 3000}).status_code == 413
        long = [{"role": "user", "content": "word " * 40}]
        assert http.post(CHAT, json={"messages": long}).json()["error"]["code"] == "context_length_exceeded"
        assert http.post(CHAT, json={"messages": LINES, "max_tokens": 2}).status_code == 200


def test_texts_become_tokens_and_tokens_texts(http: Any) -> None:
    text = "def count_lines(path):\n    return"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert "".join(found["token_strs"]) == text
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == text
    chat = http.post("/tokenize", json={"messages": LINES}).json()["tokens"]
    assert demo_pair().tokenizer.decode(chat).endswith("<|im_start|>assistant\n")
    for body in ({}, {"prompt": 3}, {"tokens": [1]}):
        assert http.post("/tokenize", json=body).status_code == 400
    for body in ({}, {"tokens": "1"}, {"tokens": [-1]}, {"tokens": [99999]}, {"tokens": [1], "x": 1}):
        assert http.post("/detokenize", json=body).status_code == 400


def test_metrics_count_what_was_done() -> None:
    with serving(demo_pair()) as running, client(running) as http:
        answers = [http.post(CHAT, json={"messages": LINES, "max_tokens": 12}).json() for _ in range(2)]
        wait_for(lambda: 'quasar_requests_total{outcome="answered"} 2.0' in http.get("/metrics").text)
        lines = http.get("/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values["quasar_generated_tokens_total"]) == 24
        assert float(values["quasar_prompt_tokens_total"]) == 2 * answers[0]["usage"]["prompt_tokens"]
        assert float(values["quasar_cached_tokens_total"]) == answers[1]["timings"]["cache_n"] > 0
        assert float(values["quasar_drafted_tokens_total"]) == sum(answer["timings"]["draft_n"] for answer in answers)
        assert 0 < float(values["quasar_confirm_rate"]) <= 1
        assert float(values["quasar_time_to_first_token_seconds_count"]) == 2
        assert float(values["quasar_acceptance_length_count"]) == 2
        assert float(values["quasar_queue_length"]) == 0


def test_what_the_default_mode_needs_is_settled_before_anybody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(demo_pair()) as running, client(running) as http:
        running.server.worker.prepare()
        monkeypatch.setattr("quasar_core.serve.worker.Generator", lambda *given, **options: pytest.fail("settled late"))
        assert http.post(CHAT, json={"messages": LINES, "max_tokens": 2}).status_code == 200


def gated(**options: Any) -> tuple[GatedModel, Any]:
    """A server whose passes wait for permits."""
    model = GatedModel()
    return model, serving(make_pair(model, max_context=4096), GATED, **options)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_client_that_goes_away_ends_its_answer_before_the_next_pass(where: str, stream: bool) -> None:
    """In the prompt too, which takes four passes here."""
    model, running = gated()
    with running as server:
        worker = server.server.worker
        body = {"prompt": [5] * 2000, "max_tokens": 64, "stream": stream}
        if where == "answer":
            model.permits.release(6)
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
            content = json.dumps(body)
            lines = [f"POST {TEXT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            raw.sendall("\r\n".join([*lines, f"Content-Length: {len(content)}", "", content]).encode())
            wait_for(lambda: model.passes == 6 if where == "answer" else model.begun.is_set())
        wait_for(lambda: worker._current is None or worker._current.cancelled)
        before = model.passes
        model.permits.release(1000)
        wait_for(lambda: worker._current is None)
        assert model.passes <= before + 1
        assert server.server.metrics.requests.labels("cancelled")._value.get() == 1


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    model, running = gated(queue=1)
    with running as server:
        replies: list[int] = []

        def ask() -> None:
            with client(server) as http:
                replies.append(http.post(TEXT, json={"prompt": [5, 6], "max_tokens": 2}).status_code)

        askers = [threading.Thread(target=ask) for _ in range(2)]
        askers[0].start()
        wait_for(model.begun.is_set)
        askers[1].start()
        wait_for(lambda: server.server.worker._queue.full())
        with client(server) as http:
            refused = http.post(TEXT, json={"prompt": [5, 6], "max_tokens": 2})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        model.permits.release(1000)
        for asker in askers:
            asker.join()
        assert replies == [200, 200]


def test_an_answer_that_takes_too_long_ends_with_an_error() -> None:
    model, running = gated(timeout=0.05)
    with running as server, client(server) as http:
        threading.Timer(0.3, model.permits.release, [1000]).start()
        reply = http.post(TEXT, json={"prompt": [5, 6], "max_tokens": 64})
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "timeout"


def test_a_shutdown_tells_those_who_wait() -> None:
    model, running = gated()
    replies: list[Any] = []
    with running as server:

        def ask() -> None:
            with client(server) as http:
                replies.append(http.post(TEXT, json={"prompt": [5, 6], "max_tokens": 64}))

        asker = threading.Thread(target=ask)
        asker.start()
        wait_for(model.begun.is_set)
        threading.Timer(0.2, model.permits.release, [1000]).start()
        server.server.worker.stop()
        asker.join()
    assert replies[0].status_code == 503
    assert replies[0].json()["error"]["code"] == "shutting_down"


def test_background_requests_leave_the_conversations_cache(http: Any) -> None:
    """A front end asks for a title and tags between two turns; the third turn still finds the second's cache."""
    asked, last = [*LINES], 0
    for turn in range(3):
        reply = http.post(CHAT, json={"messages": asked, "max_tokens": 24}).json()
        if turn:
            before = reply["usage"]["prompt_tokens"] - reply["timings"]["prompt_n"]
            assert before >= last - 2, "the turn before was passed anew"
        last = reply["usage"]["total_tokens"]
        asked += [reply["choices"][0]["message"], {"role": "user", "content": f"Go on, {turn}."}]
        for task in ("Write a title for this talk", "Name three tags for this talk"):
            title = {"messages": [{"role": "user", "content": f"{task}: {asked[0]['content']}"}], "max_tokens": 4}
            assert http.post(CHAT, json=title).status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_the_exact_lines_of_a_stream(http: Any) -> None:
    body = json.dumps({"messages": LINES, "max_tokens": 6, "stream": True, "stream_options": {"include_usage": True}})
    command = ["curl", "-sN", "--max-time", "60", "-H", "content-type: application/json", "-d", body]
    output = subprocess.run(
        [*command, f"{str(http.base_url).rstrip('/')}{CHAT}"], capture_output=True, text=True, check=True
    ).stdout
    events = output.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_paths_and_methods_that_are_not_served(http: Any) -> None:
    assert http.post("/v1/embeddings", json={}).status_code == 404
    assert http.get(CHAT).status_code == 405
    for method, path in (("POST", CHAT), ("POST", TEXT), ("GET", "/v1/models")):
        without = http.request(method, path.removeprefix("/v1"), json={})
        assert without.status_code in (404, 405)
        named = f"{method} {path.removeprefix('/v1')} is not served here."
        assert without.json()["error"]["message"] == f"{named} The base URL of a client ends in /v1."
    assert "assistant" not in http.get("/v1/models").json()["data"][0]["drafts"]


def test_refused_requests_are_counted(http: Any) -> None:
    def refused() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith('quasar_requests_total{outcome="ref'))

    before = refused()
    assert http.post(TEXT, json={"prompt": "a", "best_of": 3}).status_code == 400
    assert refused() == before + 1


def test_a_client_that_leaves_while_it_sends_disturbs_nobody(http: Any, caplog: pytest.LogCaptureFixture) -> None:
    host, port = http.base_url.host, http.base_url.port
    with socket.create_connection((host, port)) as leaving:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"
        leaving.sendall(f"{head}\r\n{{".encode())
    assert http.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_an_answer_that_the_end_of_the_server_cuts_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    found: list[Any] = []
    with serving(demo_pair()) as running, client(running) as http:
        body = {"prompt": "a", "max_tokens": 1500, "temperature": 1.5, "n": 8}
        asking = threading.Thread(target=lambda: found.append(http.post(TEXT, json=body)))
        asking.start()
        wait_for(lambda: running.server.worker._current is not None)
        running.stop()
        asking.join()
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "shutting_down")
    assert not [record for record in caplog.records if record.exc_info]
