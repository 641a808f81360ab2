"""The overhead's arithmetic, and a client that reads what the library writes."""

import http.client
import json

import pytest

pytest.importorskip("starlette")

from helpers.serving import FIXED, LINES, demo_pair, plain, serving

from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from tools.serve_overhead import Answer, figures
from tools.stream_client import ask


def test_the_overhead_is_that_of_the_engine_and_what_is_around_it() -> None:
    own = [Answer("a", 1.0, 0.9, tokens=100), Answer("b", 1.0, 0.9, tokens=60)]
    through = [Answer("a", 1.1, 0.95, chunks=5), Answer("b", 1.02, 0.89, chunks=4)]
    assert figures(own, through) == {
        "tokens": 160,
        "chunks": 9,
        "library_tokens_per_s": 80.0,
        "endpoint_tokens_per_s": 75.47,
        "overhead_percent": 6.0,
        "engine_percent": 2.0,
        "around_percent": 4.0,
    }


@pytest.mark.parametrize("stream", [True, False])
def test_the_client_reads_the_librarys_text(stream: bool) -> None:
    pair = demo_pair()
    wanted = Generator(pair, plain(FIXED, max_new_tokens=12)).generate(encode_prompt(pair.tokenizer, LINES))
    body = json.dumps({"messages": LINES, "max_tokens": 12, "stream": stream})
    with serving(pair) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        answer = Answer(**ask(connection, body))
        connection.close()
    assert answer.text == wanted.text
    assert 0 < answer.engine_s < answer.seconds
    assert (answer.chunks > 1) == stream
