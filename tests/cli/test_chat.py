"""`quasar chat`: commands, messages of several lines, answers that are cut, and a real terminal."""

import io
import json
import os
import pty
import select
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.stand_ins import STATS, StandInGenerator, type_lines

from quasar_cli import messages
from quasar_cli.main import run
from quasar_core.errors import ContextFull, QuasarError, UsageError
from quasar_core.files import require_characters
from quasar_core.records import FinishReason, GenerationResult

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


class Echo(StandInGenerator):
    """Answers with the tokens of the prompt as characters; three tokens, then the answer is cut."""

    asked: list[list[int]]

    def generate(self, prompt_ids: Sequence[int], on_text: Callable[[str], None]) -> GenerationResult:
        Echo.asked.append(list(prompt_ids))
        on_text("part")
        return GenerationResult(list(prompt_ids), [7, 8, 9], "part", "length", replace(STATS))


@pytest.fixture
def asked(stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The messages of every turn."""
    seen: list[list[dict[str, str]]] = []

    def encode(tokenizer: object, messages: list[dict[str, str]], *, think: bool | None = None) -> list[int]:
        seen.append(messages)
        return [1] * len(messages)

    monkeypatch.setattr("quasar_core.api.decoding.encode_prompt", encode)
    return seen


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(
    stand_in_pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def encode(tokenizer: object, messages: list[dict[str, str]], *, think: bool | None = None) -> list[int]:
        require_characters(messages[-1]["content"], "The prompt")
        return [1]

    monkeypatch.setattr("quasar_core.api.decoding.encode_prompt", encode)
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait\nnext\n"), "utf-8")
    monkeypatch.setattr("sys.stdin", piped)
    assert run(["chat"]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "Error: The prompt is not UTF-8 text: it holds the byte \\xe9."
    assert shown.out.count("[bold]") == 1


def last_texts(asked: list[list[dict[str, str]]]) -> list[str]:
    return [messages[-1]["content"] for messages in asked]


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one \\\n  two\\\nthree\nfour\n", ["one \n  two\nthree", "four"]),
        ("one\\\n", ["one"]),
        ('"""one\n\n  two"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""one"""\n', ["one"]),
        ('"""\none\n/reset\n"""\n', ["one\n/reset"]),
        ('"""one\ntwo\n', ["one\ntwo"]),
        ("//etc/passwd is what?\n", ["/etc/passwd is what?"]),
        ("\n  \n", []),
    ],
)
def test_what_is_one_message(
    typed: str, messages: list[str], asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(monkeypatch, typed)
    assert run(["chat"]) == 0
    assert last_texts(asked) == messages


def test_an_unknown_command_is_explained_and_not_sent(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "/etc/hosts is what?\n")
    assert run(["chat"]) == 2
    assert asked == []
    sentence = "Error: There is no command /etc/hosts: /help lists them, //etc/hosts sends it as text.\n"
    assert capsys.readouterr().err.endswith(sentence)


@pytest.mark.parametrize(
    ("options", "failure", "code"),
    [([], UsageError("It is too long."), 2), (["--json"], QuasarError("It failed."), 1), ([], None, 0)],
    ids=str,
)
def test_a_piped_chat_answers_on_and_its_exit_code_tells_what_was_refused(
    options: list[str],
    failure: QuasarError | None,
    code: int,
    asked: list[list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = StandInGenerator.generate

    def generate(self: StandInGenerator, *given: Any) -> GenerationResult:
        if failure is not None and len(asked) == 2:
            raise failure
        return answer(self, *given)

    monkeypatch.setattr(StandInGenerator, "generate", generate)
    type_lines(monkeypatch, "one\ntwo\nthree\n")
    assert run(["chat", *options]) == code
    shown = capsys.readouterr()
    assert len(asked) == 3
    assert ("Error: " in shown.err) == (failure is not None)
    if options:
        assert len(json.loads(shown.out)["turns"]) == 2


def test_in_a_terminal_a_refusal_is_no_failure(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(monkeypatch, "/nonsense\none\n")
    lines = messages._next_message
    monkeypatch.setattr("quasar_cli.commands.chat.read_messages", lambda _: iter(lines, None))
    monkeypatch.setattr("quasar_cli.commands.chat.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    assert run(["chat"]) == 0
    assert last_texts(asked) == ["one"]


def test_system_starts_anew(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "one\n/system\n/system Be brief.\ntwo\n/system\n/reset\nthree\n")
    assert run(["chat"]) == 0
    system = {"role": "system", "content": "Be brief."}
    assert asked[1:] == [[system, {"role": "user", "content": text}] for text in ("two", "three")]
    said = capsys.readouterr().err
    assert "(there is no system message)" in said
    assert "\nBe brief.\n" in said


def test_save_writes_the_messages_and_replaces_nothing(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("kept.json").write_text("mine")
    type_lines(monkeypatch, "one\n/save\n/save kept.json\n/save a.json\n/save missing/\n/save missing/a.json\n")
    assert run(["chat"]) == 2
    saved = json.loads(Path("a.json").read_text())
    answer = {"role": "assistant", "content": "[bold]Hé 1"}
    assert saved == {"model": "demo", "messages": [{"role": "user", "content": "one"}, answer]}
    assert Path("kept.json").read_text() == "mine"
    said = capsys.readouterr().err
    assert "Error: /save needs a file: /save FILE.\n" in said
    assert "Error: kept.json exists already: name another file.\n" in said
    assert said.count(f"Error: There is no folder {Path('missing').resolve()}: make it, or name another file.\n") == 2
    assert not Path("missing").exists()


def test_load_goes_on_with_what_save_wrote(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "/system Be brief.\none\n/save a.json\n/reset\ntwo\n/load a.json\nthree\n/reset\nfour\n")
    assert run(["chat"]) == 0
    system, one = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}
    answer = {"role": "assistant", "content": "[bold]Hé 2"}
    assert asked[2] == [system, one, answer, {"role": "user", "content": "three"}]
    assert asked[3] == [system, {"role": "user", "content": "four"}]  # of the file, not of the options
    assert "(2 messages of a.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", "{}", '{"messages": 3}', '{"messages": [3]}', '{"messages": [{"role": "user"}]}',
     '{"messages": [{"role": "king", "content": "a"}]}', '{"messages": [{"role": "user", "content": 3}]}'],
)  # fmt: skip
def test_what_is_no_conversation_is_not_loaded(
    content: str | None, asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        Path("a.json").write_text(content)
    type_lines(monkeypatch, "one\n/load a.json\n/load\ntwo\n")
    assert run(["chat"]) == 2
    assert last_texts(asked) == ["one", "two"]
    assert asked[1][0]["content"] == "one"  # the conversation stays


def test_ctrl_c_at_the_prompt_drops_the_line_and_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt(), "hello", KeyboardInterrupt(), None])

    def read() -> str | None:
        following = next(typed)
        if isinstance(following, KeyboardInterrupt):
            raise following
        return following

    monkeypatch.setattr(messages, "_read_message", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert list(messages.read_messages(keep_history=False)) == ["hello"]
    assert capsys.readouterr().err.count("(/exit or Ctrl-D ends)") == 2


def test_stats_are_those_of_the_last_answer(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "/stats\none\n/stats\n")
    assert run(["chat"]) == 2
    said = capsys.readouterr().err
    assert said.index("There is no answer yet.") < said.index("12.0 tokens/s")


def test_a_cut_answer_says_so_and_goes_on(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Echo.asked = []
    monkeypatch.setattr("quasar_core.api.decoding.Generator", Echo)
    type_lines(monkeypatch, "/more\none\n/more\n/more\ntwo\n")
    assert run(["chat", "-n", "3"]) == 2
    said = capsys.readouterr().err
    assert "There is no answer that was cut." in said
    assert said.count("(cut after 3 tokens; /more goes on, -n sets the length)") == 4
    assert Echo.asked[:3] == [[1], [1, 7, 8, 9], [1, 7, 8, 9, 7, 8, 9]]
    assert asked[3][1] == {"role": "assistant", "content": "partpartpart"}


class Full(StandInGenerator):
    """Holds prompts of three messages at most, and is full behind an answer to so many."""

    def generate(self, prompt_ids: Sequence[int], on_text: Callable[[str], None]) -> GenerationResult:
        if len(prompt_ids) > 3:
            raise ContextFull("The prompt has too many tokens.")
        ended: FinishReason = "length" if len(prompt_ids) == 3 else "eos"
        return GenerationResult(list(prompt_ids), [7], "text", ended, replace(STATS))


@pytest.mark.parametrize("opening", [[], ["--system", "Be brief."]], ids=str)
def test_a_full_context_is_made_room_in_by_dropping_the_oldest_turns(
    opening: list[str],
    asked: list[list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("quasar_core.api.decoding.Generator", Full)
    typed = "/drop\none\ntwo\nthree\n/drop\nthree\n/drop x\n/drop 0\n/drop 9\n/drop 2\n/drop\n"
    type_lines(monkeypatch, typed if not opening else "one\ntwo\n/drop\ntwo\n")
    assert run(["chat", *opening]) == 2
    said = capsys.readouterr().err
    refused = "Error: The prompt has too many tokens. In this chat /drop forgets the oldest turn, /reset all of them.\n"
    assert said.count(refused) == 1
    if opening:  # it is no turn, and stays; behind the only turn nothing older is left
        assert asked[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
        return
    assert "(cut after 1 tokens; the context is full; /drop forgets the oldest turn, /reset all of them, then" in said
    assert said.count("(forgotten: 1 of 2 turns)") == 1
    assert [message["content"] for message in asked[3]] == ["two", "text", "three"]
    assert said.count("There is no turn to forget.") == 2
    assert "/drop takes a number of turns, such as /drop 2, not x." in said
    assert "There are 2 turns to forget." in said
    assert said.count("(the conversation is forgotten)") == 1


def test_a_message_that_is_too_long_by_itself_is_no_matter_of_older_turns(
    asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Small(StandInGenerator):
        def generate(self, prompt_ids: Sequence[int], on_text: Callable[[str], None]) -> GenerationResult:
            if len(asked) == 1:
                raise ContextFull("The prompt has too many tokens.")
            return super().generate(prompt_ids, on_text)

    monkeypatch.setattr("quasar_core.api.decoding.Generator", Small)
    type_lines(monkeypatch, "one\ntwo\n")
    assert run(["chat"]) == 2  # one of the piped messages was refused
    shown = capsys.readouterr()
    assert "Error: The prompt has too many tokens. In this chat /reset starts anew.\n" in shown.err
    assert shown.out == "[bold]Hé 1\n"


# In a terminal

PROGRAM = """
import sys
from types import ModuleType, SimpleNamespace
from helpers.stand_ins import StandInGenerator
from quasar_cli.main import run

decoding = ModuleType("quasar_core.api.decoding")  # in the place of what imports PyTorch
sys.modules[decoding.__name__] = decoding
decoding.use_threads = lambda number, steer=True: None
pair = SimpleNamespace(target_name="demo", verifier_name=None, notes=[], tokenizer=None)
decoding.load = lambda options, progress, encode: pair
decoding.encode_prompt = lambda tokenizer, messages, think=None: (print("ASKED", [messages[-1]["content"]]), [1])[1]
decoding.Generator = StandInGenerator
sys.exit(run(["chat"]))
"""
PATIENCE = 60  # seconds


class Terminal:
    """A chat in a pseudoterminal: what is typed, what is seen."""

    def __init__(self, master: int, child: "subprocess.Popen[bytes]") -> None:
        self.master, self.child, self.seen = master, child, ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> str:
        """Everything up to the text, which must come."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, self.seen = self.seen.split(text, 1)
        return before


@contextmanager
def chat_in_terminal() -> Iterator[Terminal]:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True
    )
    os.close(slave)
    try:
        yield Terminal(master, child)
    finally:
        child.kill()
        child.wait()
        os.close(master)


def test_a_terminal_pastes_and_remembers(tmp_path: Path) -> None:
    with chat_in_terminal() as terminal:
        terminal.wait_for("> ")
        terminal.type("first line\nsecond line\nthird\n")  # as a paste comes where the terminal does not bracket it
        terminal.wait_for("ASKED ['first line\\nsecond line\\nthird']")
        terminal.wait_for("> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("There is no command /nonsense")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.child.wait(PATIENCE) == 0
    kept = tmp_path / "home" / "chat_history.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()][:1] == ["first line\nsecond line\nthird"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with chat_in_terminal() as terminal:
        terminal.wait_for("> ")
        terminal.type("\x1b[A" * 3 + "\n")  # up, past /exit and /nonsense
        terminal.wait_for("ASKED ['first line\\nsecond line\\nthird']")
        terminal.wait_for("> ")
        terminal.type("\x1b[200~def f():\r    return 1\x1b[201~\n")
        terminal.wait_for("ASKED ['def f():\\n    return 1']")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.child.wait(PATIENCE) == 0


def test_a_damaged_history_is_said_and_the_chat_goes_on(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "chat_history.jsonl").write_text("no json\n")
    with chat_in_terminal() as terminal:
        terminal.wait_for("cannot be used")
        terminal.wait_for("> ")
        terminal.type("one\n")
        terminal.wait_for("ASKED ['one']")
