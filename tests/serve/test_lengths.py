"""Prompts that are much too long are refused by their beginnings, and no other ones."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from helpers.serving import client, demo_pair, serving

from quasar_core.serve.errors import ApiError
from quasar_core.serve.served import BEGINNING, Served
from quasar_core.serve.settings import Settings

SHORT = Served(demo_pair(), Settings(port=0, most_prompt=4))


@given(st.text(min_size=1, max_size=40), st.integers(1, 200))
def test_what_is_refused_by_its_beginning_is_too_long(piece: str, times: int) -> None:
    """The whole text's tokens are the oracle."""
    text = piece * times
    try:
        SHORT.check_length(text, "prompt")
    except ApiError:
        assert len(SHORT.encode(text)) > SHORT.most_prompt


@pytest.mark.parametrize("role", ["system", "user", "completion"])
def test_of_a_text_that_is_much_too_long_only_the_beginning_is_encoded(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    own = Served.encode

    def encode(self: Served, text: str, special: bool = False) -> list[int]:
        encoded.append(len(text))
        return own(self, text, special)

    monkeypatch.setattr(Served, "encode", encode)
    monkeypatch.setattr(Served, "encode_messages", lambda *given: pytest.fail("all of it is encoded"))
    text = "a word or two " * 100_000
    path, body = "/v1/completions", {"prompt": text}
    if role != "completion":
        messages = [{"role": role, "content": text}, {"role": "user", "content": "Go on."}]
        path, body = "/v1/chat/completions", {"messages": messages}  # type: ignore[dict-item]
    with serving(demo_pair()) as server, client(server) as http:
        error: Any = http.post(path, json=body).json()["error"]
        assert encoded == [BEGINNING * server.server.served.most_prompt]
    assert error["code"] == "context_length_exceeded"
    assert "more than 2047 tokens" in error["message"]
