"""`quasar serve` as it is typed: what is refused before anything is loaded, and a server that starts and ends."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from quasar_cli.commands.serve import announce
from quasar_cli.main import run
from quasar_core.errors import UsageError
from quasar_core.serve.run import listen
from quasar_core.serve.settings import Settings


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["serve", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_without_the_extra_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else real(name, *rest)
    )
    said = refused(capsys)
    assert "needs uvicorn" in said
    assert "pip install 'quasar-cli[serve]'" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "example.org"], "--api-key"),
        (["--api-key", "short"], "at least 16 characters"),
        (["--api-key", "k" * 20, "--api-key-file", "x"], "once"),
        (["--api-key-file", "missing.txt"], "missing.txt"),
        (["--port", "99999"], "--port"),
        (["--prefixes", "-1"], "--prefixes"),
        (["--queue", "0"], "--queue"),
        (["--max-body", "3"], "--max-body"),
        (["--timeout", "0"], "--timeout"),
        (["--cors", "*"], "--cors"),
        (["--temperature", "-1"], "--temperature"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("starlette")
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--port"], "cannot be listened on"), (["--port", "0", "--draft-from", "nowhere.txt"], "nowhere.txt")],
)
def test_what_is_wrong_with_the_port_or_texts_is_found_before_loading(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quasar_core.api.decoding.load", lambda *given: pytest.fail("a pair was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = [] if len(arguments) > 1 else [str(taken.getsockname()[1])]
        assert said in refused(capsys, "--model", "demo", *arguments, *port)


def test_a_port_is_taken_while_a_pair_is_loaded() -> None:
    pytest.importorskip("uvicorn")
    with (
        listen(Settings(port=0)) as loading,
        pytest.raises(UsageError, match="cannot be listened on: Address already in use"),
    ):
        listen(Settings(port=loading.getsockname()[1]))


@pytest.mark.usefixtures("compiled_at_home")
@pytest.mark.parametrize(
    ("number", "codes"),
    [(signal.SIGTERM, (-signal.SIGTERM,)), pytest.param(signal.SIGINT, (130,), marks=pytest.mark.slow)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_server_starts_answers_and_ends_an_answer_with_a_sentence(
    number: int, codes: tuple[int, ...], tmp_path: Path
) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("starlette")
    (tmp_path / "key.txt").write_text("a-key-of-some-length\n")
    arguments = ["--model", "demo", "--verify", "full", "--port", "0", "--api-key-file", "key.txt", "-v"]
    command = [sys.executable, "-m", "quasar_cli", "serve", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        said = [line := process.stderr.readline()]
        while "Serving at " not in line:
            said.append(line := process.stderr.readline())
        assert any("cost: the target's passes" in told for told in said), "what was settled is told too"
        url = line.split("Serving at ")[1].split("/v1")[0]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        headers = {"authorization": "Bearer a-key-of-some-length"}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] <= 3
        body = {**body, "max_tokens": 200, "stream": True, "n": 16, "temperature": 1}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            told = [line for line in lines if line]
        assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(60) in codes
        assert process.stderr.read() == ""


@pytest.mark.parametrize("found", [True, False])
def test_a_browser_that_does_not_return_holds_nothing_up(
    found: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, left = threading.Event(), threading.Event()

    def open_page(url: str) -> bool:
        opened.set()
        return left.wait(30) and found

    monkeypatch.setattr("webbrowser.open", open_page)
    announce("http://127.0.0.1:1", True)
    assert opened.wait(30)
    browser = next(thread for thread in threading.enumerate() if thread.name == "quasar browser")
    left.set()
    browser.join(30)
    assert ("No browser could be opened" in capsys.readouterr().err) != found
