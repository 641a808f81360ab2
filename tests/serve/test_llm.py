"""`llm`, a client for the terminal: a prompt, a stream, the next turn, and an answer by a schema."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("llm", reason="llm is not installed: pip install llm")

from helpers.serving import FIXED, QUESTION, demo_pair, plain, serving

from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt

MODEL = """- model_id: quasar
  model_name: demo
  api_base: "{url}/v1"
  supports_schema: true
  supports_tools: true
"""
Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    folder = tmp_path_factory.mktemp("llm")
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
    with serving(demo_pair()) as server:
        (folder / "extra-openai-models.yaml").write_text(MODEL.format(url=server.url))

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "llm", *words]
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

        yield run


def expected(messages: list[dict[str, Any]]) -> str:
    """The library's own answer, by plain decoding."""
    pair = demo_pair()
    ids = encode_prompt(pair.tokenizer, messages)
    return Generator(pair, plain(FIXED, max_new_tokens=24)).generate(ids).text


def test_a_stream_a_whole_answer_and_the_next_turn(ask: Ask) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    text = expected(messages)
    for words in (("--no-stream",), ()):
        found = ask("-m", "quasar", *words, QUESTION, "-o", "max_tokens", "24")
        assert (found.returncode, found.stdout.strip()) == (0, text.strip()), found.stderr
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    assert ask("-c", "Go on.", "-o", "max_tokens", "24").stdout.strip() == expected(messages).strip()


def test_an_answer_by_a_schema(ask: Ask) -> None:
    found = ask("-m", "quasar", "--schema", "name, lines int", "Describe a file.", "-o", "max_tokens", "200")
    if found.stdout.rstrip().endswith("}"):  # a name may go on to the last token
        value = json.loads(found.stdout)
        assert isinstance(value["lines"], int)
    assert found.stdout.startswith('{"name": "')


def test_what_the_model_cannot_do_is_told(ask: Ask) -> None:
    found = ask("-m", "quasar", "-T", "llm_version", "Which version is this?")
    assert found.returncode == 1
    assert "takes no tools in a form that is known here" in found.stderr


def test_the_model_is_set_up_as_the_page_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for word in ("extra-openai-models.yaml", "model_name: demo", "supports_schema: true"):
        assert word in page
