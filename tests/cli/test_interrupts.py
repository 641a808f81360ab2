"""Ctrl-C in an answer: what was written stays, and a command ends, or a chat goes back to its prompt.

And other ends of a command's output: a pipe that nobody reads any more, a terminal that can do little.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.stand_ins import StandInGenerator, type_lines

from quasar_cli import messages
from quasar_cli.main import run
from quasar_core.records import GenerationResult

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


class Interrupted(StandInGenerator):
    """Is interrupted in its answers to prompts of three tokens."""

    def generate(self, prompt_ids: Sequence[int], on_text: Callable[[str], None]) -> GenerationResult:
        if len(prompt_ids) == 3:
            on_text("ha")
            on_text("lf")
            raise KeyboardInterrupt
        return super().generate(prompt_ids, on_text)


@pytest.fixture
def interrupted(stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar_core.api.decoding.Generator", Interrupted)


@pytest.mark.parametrize(
    ("options", "out"),
    [([], "half\n"), (["--no-stream"], "half\n"), (["--trace"], "half\n"), (["--json"], "")],
    ids=str,
)
@pytest.mark.usefixtures("interrupted")
def test_generate_keeps_what_was_written_and_ends(
    options: list[str], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--raw", "--prompt", "abc", *options]) == 130
    shown = capsys.readouterr()
    assert shown.out == out
    assert shown.err.endswith("(stopped)\n")


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=str)
@pytest.mark.usefixtures("interrupted")
def test_a_chat_goes_back_to_its_prompt(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resets = StandInGenerator.resets
    type_lines(monkeypatch, "abc\nde\n")
    lines = messages._next_message
    monkeypatch.setattr("quasar_cli.commands.chat.read_messages", lambda _: iter(lines, None))
    monkeypatch.setattr("quasar_cli.commands.chat.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    assert run(["chat", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == "half\n[bold]Hé 9\n"  # 3 + the half answer's 4 + 2
    assert "(stopped)" in shown.err
    assert StandInGenerator.resets == resets + 1


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
@pytest.mark.usefixtures("interrupted")
def test_a_chat_whose_messages_come_from_a_pipe_ends(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "one\ntwo\nthree\n")
    monkeypatch.setattr("quasar_core.api.decoding.encode_prompt", lambda tokenizer, asked, think=None: [1] * len(asked))
    assert run(["chat", *options]) == 130
    shown = capsys.readouterr()
    assert ('"turns"' in shown.out) == bool(options)
    assert shown.out.count("Hé") == 1  # the first answer; the second was stopped, and no third was begun
    assert "(stopped)" in shown.err


PROGRAM = """
import signal, sys
from types import ModuleType, SimpleNamespace
from helpers.stand_ins import StandInGenerator
from quasar_cli.main import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored

class Endless(StandInGenerator):
    def generate(self, prompt_ids, on_text):
        on_text("half")
        while True:
            signal.pause()

class Long(StandInGenerator):
    def generate(self, prompt_ids, on_text):
        for _ in range(100_000):
            on_text("a line\\n")


decoding = ModuleType("quasar_core.api.decoding")  # in the place of what imports PyTorch
sys.modules[decoding.__name__] = decoding
decoding.use_threads = lambda number, steer=True: None
pair = SimpleNamespace(target_name="demo", verifier_name=None, notes=[], tokenizer=None, fidelity=None)
pair.rounds_alike = True
decoding.load = lambda options, progress, encode: pair
decoding.encode_prompt = lambda tokenizer, messages, raw=False, think=None: [1]
decoding.trace_of = decoding.write_trace = None
decoding.Generator = {"endless": Endless, "long": Long, "short": StandInGenerator}[sys.argv[1]]
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]], ids=str)
def test_a_process_that_is_interrupted_shows_no_traceback(command: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "endless", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"Hello\nHello\n")
        process.stdin.close()
        assert process.stdout.read(4) == b"half"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"\n"
        assert process.stderr.read().endswith(b"(stopped)\n")
        assert process.wait(60) == 130


IMPORTING = """
import sys

interrupted = sys.argv[1]

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
from quasar_cli.__main__ import main
sys.argv[1:] = ["models"]
main()
"""
SWALLOWING = """
import signal
import time
import quasar_cli.main
from quasar_cli.__main__ import main

class Swallows:
    def __del__(self):
        raise KeyboardInterrupt

def command():
    Swallows()
    while True:
        time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be told to ignore it
quasar_cli.main.main = command
main()
"""


@pytest.mark.parametrize("module", ["typer", "rich.console", "quasar_core.store.pairs"])
def test_an_interrupt_while_parts_are_imported_shows_no_traceback(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING, module], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


HALF_DONE = """
import os
import signal

try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # in one of these steps Python would raise it
        pass
except BaseException:
    raise ImportError("a part is missing") from None
done = True
"""
WITH_AN_IMPORT = """
import signal
import time
import quasar_cli.main
from quasar_cli.__main__ import main

def command():
    import half_done

    print(half_done.done, flush=True)
    while True:
        time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be told to ignore it
quasar_cli.main.main = command
main()
"""


def test_an_interrupt_within_an_import_comes_behind_it(tmp_path: Path) -> None:
    """Libraries take what is raised in an import for a part that is not there."""
    (tmp_path / "half_done.py").write_text(HALF_DONE)
    found = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", WITH_AN_IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=found)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout in ("", "True\n")  # it may come before anything is printed


def test_a_second_interrupt_within_an_import_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "half_done.py").write_text(
        "import os\nimport signal\nimport time\n\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1)  # meanwhile the first comes again by itself\ntime.sleep(60)\n"
    )
    found = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", WITH_AN_IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=found)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_that_a_library_swallows_comes_once_more() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWING], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_other_exceptions_that_are_ignored_are_still_told() -> None:
    program = "import sys; from quasar_cli.__main__ import interrupt_again; sys.unraisablehook = interrupt_again\n"
    program += "class Fails:\n    def __del__(self):\n        raise ValueError('half done')\nFails()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "half done" in done.stderr


def test_a_pipe_that_nobody_reads_any_more_ends_the_command_in_silence() -> None:
    command = [sys.executable, "-c", PROGRAM, "long", "generate", "--prompt", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_a_terminal_that_can_do_little_gets_plain_text() -> None:
    poor = {"TERM": "dumb", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    command = [sys.executable, "-c", PROGRAM, "short", "generate", "--prompt", "x"]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, **poor}, check=False)
    assert ended.returncode == 0
    assert ended.stdout == b"[bold]H? 1\n"
    assert b"acceptance length" in ended.stderr
    assert b"\x1b" not in ended.stderr
