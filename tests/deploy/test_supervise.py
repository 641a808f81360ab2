"""An engine that dies is started anew, one that never answered is not, and one that is asked to end ends."""

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from quasar_cli.commands import deploy
from quasar_core.deploy import supervise
from quasar_core.deploy.supervise import Supervisor
from quasar_core.deploy.wish import Command, Wish
from quasar_core.errors import UsageError
from quasar_core.ports import listen_at

# Counts its starts in a file; says that it answers by the port that it is given; ends as told.
ENGINE = """
import http.server, json, os, pathlib, subprocess, sys, threading, time
starts, port, answers, ends = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "yes", sys.argv[4]
starts.write_text(str(int(starts.read_text() or 0) + 1) if starts.exists() else "1")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        asked.set()
    def log_message(self, *given): pass
asked = threading.Event()
if answers:
    class Server(http.server.HTTPServer):
        allow_reuse_address = True
    threading.Thread(target=Server(("127.0.0.1", port), Health).serve_forever, daemon=True).start()
    asked.wait(30)
if ends == "dies":
    os._exit(3)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def port() -> int:
    """A free one."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return server.server_address[1]


def supervisor(folder: Path, port: int, answers: str, ends: str, said: list[str], restarts: int = 2) -> Supervisor:
    words = (sys.executable, "-c", ENGINE, str(folder / "starts"), str(port), answers, ends)
    return Supervisor(Command(words, {"QUIET": "1"}), f"http://127.0.0.1:{port}", said.append, restarts)


@pytest.fixture(autouse=True)
def _polls_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "POLL", 0.02)


def starts(folder: Path) -> int:
    return int((folder / "starts").read_text())


def test_an_engine_that_dies_is_started_anew(tmp_path: Path, port: int) -> None:
    said: list[str] = []
    assert supervisor(tmp_path, port, "yes", "dies", said).run() == 3
    assert starts(tmp_path) == 3
    assert sum("started anew" in line for line in said) == 2


def test_one_that_never_answered_is_not(tmp_path: Path, port: int) -> None:
    said: list[str] = []
    assert supervisor(tmp_path, port, "no", "dies", said).run() == 3
    assert starts(tmp_path) == 1
    assert said == []


def test_it_ends_when_it_is_asked_to(tmp_path: Path, port: int) -> None:
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    running = supervisor(tmp_path, port, "yes", "stays", said)
    running._say = interrupt
    before = signal.getsignal(signal.SIGINT)
    assert running.run() == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert starts(tmp_path) == 1
    assert "Serving at" in said[0]
    assert running._process is not None
    assert running._process.poll() is not None


def test_a_port_that_another_server_has_is_told_before_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar_core.deploy.installed.require_installed", lambda engine, python: None)
    monkeypatch.setattr(Supervisor, "run", lambda self: pytest.fail("it was started"))
    with listen_at("127.0.0.1", 0) as other:
        wish = Wish(port=other.getsockname()[1])
        with pytest.raises(UsageError, match="cannot be listened on: Address already in use"):
            deploy._run(SimpleNamespace(wish=wish, command=Command(("false",))))
    monkeypatch.setattr(Supervisor, "run", lambda self: 0)
    assert deploy._run(SimpleNamespace(wish=wish, command=Command(("false",)))) == 0


def test_json_of_the_command_is_unharmed() -> None:
    """What is started is what is printed: words, not a shell's line."""
    script = "import json, sys; sys.exit(7 if json.loads(sys.argv[1]) == {'a': '|'} else 1)"
    words = (sys.executable, "-c", script, json.dumps({"a": "|"}))
    assert Supervisor(Command(words), "http://127.0.0.1:9", print).run() == 7
