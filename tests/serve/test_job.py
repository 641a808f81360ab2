"""Events between the engine's thread and a request's loop: it is woken seldom, and nothing is lost or mixed up."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from helpers.serving import FIXED, LINES, client, demo_pair, plain, serving

from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.serve import job as jobs
from quasar_core.serve.errors import ApiError
from quasar_core.serve.job import Begun, Finished, Job, Written, by_answer, read_events
from quasar_core.serve.parts import Part, join_parts
from quasar_core.serve.tools import ToolCall

LONG = 3600.0  # seconds, which no test waits for
ASKS: list[Any] = [None]
Batches = list[list[tuple[int, Any]]]


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GATHER", LONG)
    monkeypatch.setattr(jobs, "PAUSE", LONG)


def text(word: str) -> Written:
    return Written(word, [1])


def read(told: Sequence[Any], stream: bool, asks: Sequence[Any] = ASKS) -> Batches:
    """The batches that a reader gets where each event is told by another thread while the loop waits."""
    batches: Batches = []

    async def run() -> None:
        job = Job(asks, asyncio.get_running_loop(), LONG)
        numbers = iter(told)

        def tell() -> None:
            for event in numbers:
                job.emit(*event)

        teller = threading.Thread(target=tell)
        asyncio.get_running_loop().call_soon(teller.start)
        async for batch in read_events(job, stream):
            batches.append(batch)
        teller.join()

    asyncio.run(run())
    return batches


@pytest.mark.usefixtures("long_pauses")
def test_the_first_text_comes_at_once_and_the_rest_with_the_end() -> None:
    async def run() -> Batches:
        job, batches = Job(ASKS, asyncio.get_running_loop(), LONG), Batches()
        job.emit(0, Begun())
        async for batch in read_events(job, stream=True):
            batches.append(batch)
            if len(batches) == 1:
                job.emit(0, text("a"))
            elif len(batches) == 2:
                for word in "bcd":
                    job.emit(0, text(word))
                job.emit(0, Finished(None))
        return batches

    batches = asyncio.run(run())
    assert batches == [[(0, Begun())], [(0, text("a"))], [(0, text(word)) for word in "bcd"] + [(0, Finished(None))]]


@pytest.mark.usefixtures("long_pauses")
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_all_that_another_thread_tells_is_read_in_its_order(lengths: list[int]) -> None:
    told: list[tuple[int, Any]] = []
    for number, length in enumerate(lengths):
        told += [(number, Begun()), *((number, text(str(i))) for i in range(length)), (number, Finished(None))]
    asks = [None] * len(lengths)
    for stream in (True, False):
        batches = read(told, stream, asks)
        assert [event for batch in batches for event in batch] == told
        assert stream or len(batches) <= len(lengths)
        grouped = [(number, event) for number, events in by_answer(told) for event in events]
        assert grouped == told


@pytest.mark.usefixtures("long_pauses")
@pytest.mark.parametrize("stream", [True, False])
def test_what_came_before_an_error_is_read(stream: bool) -> None:
    found: Batches = []

    async def run() -> None:
        job = Job(ASKS, asyncio.get_running_loop(), LONG)
        for event in (Begun(), text("a"), ApiError(504, "Too long.")):
            job.emit(0, event)
        async for batch in read_events(job, stream):
            found.append(batch)

    with pytest.raises(ApiError, match="Too long"):
        asyncio.run(run())
    assert [event for batch in found for event in batch] == [(0, Begun()), (0, text("a"))]


def test_the_loop_is_not_woken_while_it_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs the engine is a wake-up: none for a piece of text within a pause, and none at all in whole replies."""
    monkeypatch.setattr(jobs, "GATHER", LONG)
    woken: list[Callable[..., Any]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        job = Job(ASKS, loop, LONG)
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: woken.append(call[0]) or loop.call_soon(*call))
        waiting = asyncio.ensure_future(job.wait(LONG, for_end=True))
        await asyncio.sleep(0)
        for word in "abc":
            job.emit(0, text(word))
        assert not woken
        job.emit(0, Finished(None))
        await waiting
        assert len(woken) == 1

    asyncio.run(run())


@pytest.fixture
def http(long_pauses: None) -> Iterator[Any]:
    with serving(demo_pair()) as running, client(running) as http:
        yield http


def events_of(http: Any, path: str, body: dict[str, Any]) -> list[Any]:
    lines = http.post(path, json={**body, "stream": True}).text.removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_has_few_chunks_and_the_whole_text(http: Any) -> None:
    pair = demo_pair()
    wanted = Generator(pair, plain(FIXED)).generate(encode_prompt(pair.tokenizer, LINES))
    body = {"messages": LINES, "max_tokens": 64, "logprobs": True, "trace": True}
    chunks = events_of(http, "/v1/chat/completions", body)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == wanted.text
    assert 4 <= len(chunks) <= 5  # the role, the first text, the rest, what a stop text might have begun, the end
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == [pair.tokenizer.decode([i]) for i in wanted.token_ids]
    made = [token["text"] for chunk in chunks for token in chunk.get("quasar", {}).get("tokens", ())]
    assert "".join(made) == wanted.text
    several = events_of(http, "/v1/completions", {"prompt": ["def count", "import"], "max_tokens": 12, "logprobs": 1})
    for number, prompt in enumerate(("def count", "import")):
        wanted = Generator(pair, plain(FIXED, max_new_tokens=12)).generate(pair.tokenizer(prompt)["input_ids"])
        own = [chunk["choices"][0] for chunk in several if chunk["choices"][0]["index"] == number]
        assert "".join(choice["text"] for choice in own) == wanted.text
        tokens = [token for choice in own if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
        assert tokens == [pair.tokenizer.decode([token]) for token in wanted.token_ids]
        assert [choice["finish_reason"] for choice in own][-1] is not None


CALL = Part("call", call=ToolCall("f", "{}"))
PARTS = st.one_of(
    st.just(CALL), st.builds(Part, st.sampled_from(["content", "reasoning"]), st.text("ab", min_size=1, max_size=3))
)


@given(st.lists(PARTS))
def test_joined_parts_say_the_same_in_the_same_order(parts: list[Part]) -> None:
    def said(parts: list[Part]) -> list[Any]:
        return [piece for part in parts for piece in ([part] if part.call else [(part.kind, c) for c in part.text])]

    joined = join_parts(parts)
    assert said(joined) == said(parts)
    assert all(a.call or b.call or a.kind != b.kind for a, b in itertools.pairwise(joined))


def test_what_is_written_is_sent_at_once() -> None:
    """Else the second part of a reply waits for the client to acknowledge the first, which takes 40 ms."""
    with serving(demo_pair()) as running, client(running) as http:
        assert http.get("/health").status_code == 200
        (connection,) = running._uvicorn.server_state.connections
        connected = connection.transport.get_extra_info("socket")
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
